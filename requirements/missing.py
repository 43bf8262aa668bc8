"""Print the part of a lock file that this interpreter's environment lacks, whatever the version it has.

For environments with a torch and a Detectron2 of their own: nothing that is there is replaced.
"""

import importlib.metadata
import importlib.util
import re
import sys

# torch runs here, so whatever it was built to need is there, under whichever name
TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(lock: str) -> None:
    here = {normal(name) for d in importlib.metadata.distributions() if (name := d.metadata["Name"])}
    if importlib.util.find_spec("cv2"):  # OpenCV goes by several names
        here.add("opencv-python-headless")
    wanted = False
    with open(lock, encoding="utf-8") as lines:
        for line in lines:
            if match := re.match(r"[A-Za-z0-9][\w.-]*", line):  # else a hash or a comment of the one above
                name = normal(match.group())
                wanted = name not in here and not TORCH.fullmatch(name)
            if wanted:
                print(line, end="")


if __name__ == "__main__":
    main(sys.argv[1])
