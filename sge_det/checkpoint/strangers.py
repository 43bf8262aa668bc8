"""What stands where weights should be, by its first bytes: a sentence that says what it is and what to do."""

import codecs
import os
import re
import zipfile
from pathlib import Path

from iopath.common.file_io import get_cache_dir

from .torch_files import ZIP_MAGIC

_FETCH = "fetch the file itself"
_AGAIN = "fetch or copy it again"
_UNPACK = "unpack it, and name the file in it"
_DUMP = "save a dict of {} with pickle.dump in a file that ends in .pkl"
_SAVE = "save the weights with torch.save under PyTorch's names"
# How files begin that are something else than weights of PyTorch.
_BEGINNINGS = {
    b"\x89HDF": f"it is HDF5, as Keras writes it: {_SAVE}",
    b"\x1f\x8b\x08": "it is compressed by gzip: unpack it",
    b"BZh": "it is compressed by bzip2: unpack it",
    b"\xfd7zXZ": "it is compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it",
    b"7z\xbc\xaf": f"it is a 7z archive: {_UNPACK}",
    b"Rar!": f"it is a RAR archive: {_UNPACK}",
    b"GGUF": "it is GGUF: take the file that it was made of",
    b"\x93NUMPY": f"it is a single array of NumPy: {_DUMP.format('all arrays')}",
    **dict.fromkeys(
        (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM"),
        f"it is an image or a video: {_FETCH}",
    ),
    b"\x7fELF": f"it is a program: {_FETCH}",
    b"SQLite format": f"it is a database: {_FETCH}",
}
# How texts begin.
_TEXTS = {
    "<": f"it is a web page: {_FETCH}",
    "%PDF": f"it is a PDF: {_FETCH}",
    "version https://git-lfs": f"it is a pointer of Git LFS: {_FETCH} with 'git lfs pull'",
    **dict.fromkeys(
        "{[",
        "it is JSON: name the file that holds the tensors; where it lists several, save one dict of all of theirs with "
        "torch.save",
    ),
}
# What names end in.
_ENDINGS = {
    ".onnx": "it is a model of ONNX: take the weights that it was exported from",
    ".h5": f"it is of Keras: {_SAVE}",
    ".pdparams": f"it is of Paddle: {_SAVE}",
    ".caffemodel": "it is of Caffe: convert it to a pickle of blobs, as Detectron had them",
    ".msgpack": f"it is of Flax: {_SAVE}",
    ".npz": f"it is an archive of NumPy arrays: {_DUMP.format('them')}",
}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Pickles of the oldest kind are text, too: a mark, a number, a text in quotes or a global.
_OLD_PICKLE = re.compile(r"\(|[LIF]-?[\d.]|S['\"]|V\\|c[\w.]+\n\w+\n")
_TAR_MAGIC = slice(257, 262)
_SHOWN = 40
_SAFETENSORS = ".safetensors"
_WEIGHTS = (".pth", ".pkl", ".pt", ".bin", _SAFETENSORS)
# What a run and save_pretrained leave in a folder, the usual first.
_USUAL = ("model_final.pth", "model_best.pth", "model.safetensors")


def folder_told(folder: Path) -> str:
    """That a folder stands where a file of weights should, and which file in it may be meant."""
    try:
        names = [path.name for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()]
        tag = (folder / "last_checkpoint").read_text() if (folder / "last_checkpoint").is_file() else ""
    except (OSError, ValueError):
        return "it is a folder: name a file"
    # names of checkpoints have their iteration in them
    found = next((name for name in (*_USUAL, tag.strip(), *sorted(names, reverse=True)) if name in names), None)
    return (
        f"it is a folder: name the file, {folder / found}" if found else "it is a folder without weights: name a file"
    )


def what_file(path: Path) -> str:
    """What a file is that could not be read as weights, as far as it tells; "" where it does not."""
    with open(path, "rb") as file:
        start = file.read(512)
    what = _what(path, start)
    is_kept = any(word in what for word in (_FETCH, _AGAIN)) and path.is_relative_to(get_cache_dir())
    return what + ", and remove this one, which would be taken again" * is_kept


def _what(path: Path, start: bytes) -> str:
    if not start:
        return f"it is empty: {_FETCH}"
    if _begins_as_safetensors(start):
        return "" if path.suffix == _SAFETENSORS else "it is of safetensors: give it a name that ends in .safetensors"
    if start[_TAR_MAGIC] == b"ustar":
        return f"it is a tar archive: {_UNPACK}"
    if start.startswith(ZIP_MAGIC):
        return _what_archive(path)
    if not start.strip(b"\0"):
        return f"it begins with zeros alone, as what was never written: {_AGAIN}"
    # a text may begin as an image does
    found = next((what for begin, what in _BEGINNINGS.items() if start.startswith(begin)), "")
    return _what_text(path, start) or found or _ENDINGS.get(path.suffix, "")


def _begins_as_safetensors(start: bytes) -> bool:
    # the length of a header, which is no 4 GB, and the header
    return start[4:8] == bytes(4) and start[8:9] == b"{"


def _what_text(path: Path, start: bytes) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-16" if start[:2] in _UTF16 else "utf-8-sig")().decode(start).strip()
    except UnicodeDecodeError:
        return ""
    words = " ".join(text.split())
    if not words.isprintable() or _OLD_PICKLE.match(text):
        return ""
    found = next((what for begin, what in _TEXTS.items() if text.startswith(begin)), None)
    if found or not text:
        return found or f"it is empty: {_FETCH}"
    if "/" not in text and os.path.isfile(path.parent / text):  # a name too long for any file is of none, too
        return f"it names {text}, which is beside it: name that"
    if path.suffix in (".yaml", ".yml", ".py"):
        return "it is a config, or a program: name its weights"
    shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
    return f"it is text ({shown!r}): {_FETCH}"


def _what_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"it is an archive that is damaged or cut off: {_AGAIN}"
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript program, not weights: save the state_dict of its module"
    if names and all(name.endswith(".npy") for name in names):
        return _ENDINGS[".npz"]
    is_of_torch = any(name.endswith("data.pkl") for name in names)
    if is_of_torch and path.suffix == _SAFETENSORS:
        return "it is a file of torch.save: give it a name that ends in .pth"
    return "" if is_of_torch else f"it is a zip archive: {_UNPACK}"
