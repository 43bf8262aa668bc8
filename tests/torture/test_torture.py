"""A sample of the points that `make torture` tries, and what it relies on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
from faulty_files import Disk, Faults  # noqa: E402


def torture(*arguments):
    command = [sys.executable, "-W", "ignore", str(FOLDER / "torture.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_sample_of_the_points():
    ended = torture("--programs", "convert", "evaluate", "train", "--every", "150", "--kinds", "kill", "ENOSPC", "EIO")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert int(ended.stdout.splitlines()[-1].split()[0]) > 5


def in_child(function):
    """Runs ``function`` in a process of its own, which it may spoil; returns how that ended."""
    pid = os.fork()
    if not pid:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def three_files(folder):
    """Eight operations: three times to open and write, a name, and its end."""
    for name in ("a", "b", "c"):
        with open(folder / name, "w") as file:
            file.write(f"of {name}")
    os.replace(folder / "c", folder / "d")
    (folder / "b").unlink()


@pytest.mark.parametrize(
    ("at", "left"),
    [
        (1, {}),
        (2, {"a": "of"}),
        (3, {"a": "of a"}),
        (6, {"a": "of a", "b": "of b", "c": "of"}),
        (7, {"a": "of a", "b": "of b", "c": "of c"}),
        (8, {"a": "of a", "b": "of b", "d": "of c"}),
    ],
)
def test_a_process_is_killed_in_the_middle_of_an_operation(tmp_path, at, left):
    def killed():
        Faults(tmp_path, kind="SIGKILL", at=at).install()
        three_files(tmp_path)

    assert in_child(killed) == -9
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize(("kind", "left"), [("EIO", {"a": "of a", "b": "of b"}), ("ENOSPC", {"a": "of a", "b": "of"})])
def test_an_operation_fails_once_or_all_that_take_room_from_there_on(tmp_path, kind, left):
    other = tmp_path / "other"

    def failing():
        Faults(tmp_path, kind=kind, at=4).install()
        try:
            three_files(tmp_path)
        except OSError:
            try:
                other.write_text("more")
            except OSError:
                os._exit(28)
            os._exit(5)

    assert in_child(failing) == {"EIO": 5, "ENOSPC": 28}[kind]
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found.pop("other", None) == {"EIO": "more", "ENOSPC": None}[kind]
    assert found == left


def test_what_outlasts_a_power_cut(tmp_path):
    """By hand: a file whose name was synced before its bytes, one that was renamed over another, one never synced."""
    start, after = tmp_path / "start", tmp_path / "after"
    start.mkdir()
    (start / "kept").write_text("old")
    disk = Disk(start)
    record = [
        *(("open", "part", True, False), ("write", "part", 0, b"new"), ("fsync", "part"), ("rename", "part", "kept")),
        *(("open", "named", True, False), ("fsync", "."), ("write", "named", 0, b"late")),
        *(("mkdir", "folder"), ("open", "folder/lost", True, False), ("fsync", "folder/lost")),
    ]
    for entry in record[:4]:
        disk.apply(*entry)
    expected = {(True, True): {"kept": "old"}, (False, True): {"kept": "new"}, (False, False): {"kept": "new"}}
    for place, (synced, files) in enumerate(expected.items()):
        folder = tmp_path / f"early{place}"
        folder.mkdir()
        disk.lay_out(folder, names_synced=synced[0], bytes_synced=synced[1])
        assert {path.name: path.read_text() for path in folder.iterdir()} == files
    for entry in record[4:]:
        disk.apply(*entry)
    after.mkdir()
    disk.lay_out(after, names_synced=True, bytes_synced=True)
    assert {path.name: path.read_text() for path in after.iterdir()} == {"kept": "new", "named": ""}
