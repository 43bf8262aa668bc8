"""What is forked behaves as what a new interpreter runs."""

import json
import os
import re
import signal
import subprocess
import sys

import forked_python
import pytest

TELL = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.getenv("HERE"), os.getsid(0) == os.getpid(), __name__, sys.path[0]]))
print("told", file=sys.stderr)
"""


@pytest.mark.parametrize("is_module", [False, True])
def test_words_folder_environment_and_streams(tmp_path, is_module):
    (tmp_path / "said.py").write_text(TELL)
    command = [sys.executable, *(["-m", "said"] if is_module else [tmp_path / "said.py"]), "one", "-m"]
    how = {"cwd": tmp_path, "env": {**os.environ, "HERE": "here"}}
    done = forked_python.run(command, timeout=60, **how)
    fresh = subprocess.run(command, capture_output=True, text=True, start_new_session=True, **how)
    assert (done.returncode, done.stdout, done.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert json.loads(done.stdout)[:4] == [["one", "-m"], str(tmp_path), "here", True]


@pytest.mark.parametrize(
    "line",
    ["sys.exit(3)", "sys.exit('no')", "sys.exit()", "raise KeyError(1)", "os.kill(os.getpid(), 9)", "import no_such"],
)
def test_ends(tmp_path, line):
    (tmp_path / "end.py").write_text(f"import atexit, os, sys\natexit.register(print, 'the end')\n{line}\n")
    command = [sys.executable, tmp_path / "end.py"]
    done = forked_python.run(command, timeout=60)
    fresh = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (fresh.returncode, fresh.stdout)
    assert done.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


SPAWN = """
import multiprocessing, os, sys
found = []
def tell(queue, number):
    queue.put((number, found, os.getppid(), os.environ["SET"], sys.argv, __name__))
    sys.exit(number)
if __name__ == "__main__":
    found.append("in the parent")
    os.environ["SET"] = "set"
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    started = [context.Process(target=tell, args=(queue, number)) for number in range(3)]
    for process in started:
        process.start()
    told = sorted(queue.get() for _ in started)
    for process in started:
        process.join()
    told = [rest for _, lists, parent, *rest in told if not lists and parent == os.getpid()]
    print(told, [process.exitcode for process in started])
"""


def test_what_is_spawned(tmp_path):
    """The third, which was not announced, is a new interpreter."""
    (tmp_path / "spawn.py").write_text(SPAWN)
    done = forked_python.run([sys.executable, tmp_path / "spawn.py", "--num-gpus", "2"], timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"'set', \['\S+spawn.py', '--num-gpus', '2'\], '__mp_main__'", done.stdout)) == 3
    assert done.stdout.endswith(" [0, 1, 2]\n")


def test_it_is_signalled_and_its_input_is_a_pipe(tmp_path):
    (tmp_path / "wait.py").write_text("import sys\nprint(sys.stdin.read())\n")
    with open(tmp_path / "out", "w") as out:
        processes = [
            forked_python.start([sys.executable, tmp_path / "wait.py"], stdin=subprocess.PIPE, stdout=out)
            for _ in range(2)
        ]
        assert [process.poll() for process in processes] == [None, None]
        os.killpg(processes[0].pid, signal.SIGTERM)
        assert processes[0].wait(60) == -signal.SIGTERM
        processes[1].stdin.write(b"heard")
        processes[1].stdin.close()
        assert processes[1].wait(60) == 0
    assert (tmp_path / "out").read_text() == "heard\n"
