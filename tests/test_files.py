import errno
import fcntl
import hashlib
import os
import threading

import pytest

from sge_det import files
from sge_det.errors import UserError
from sge_det.files import (
    check_folder,
    drop_torn_line,
    make_folder,
    publish_file,
    publish_folder,
    remove_file,
    replacing,
    write_file,
    write_json,
)

CALLS = ("open", "fsync", "replace")


@pytest.fixture
def calls(monkeypatch):
    """The calls that matter to a disk, as they are made: (name, the file's or folder's name)."""
    made, names = [], {}

    def watch(name, describe):
        real = getattr(os, name)

        def call(*arguments, **keywords):
            result = real(*arguments, **keywords)
            made.append((name, describe(arguments, result)))
            return result

        monkeypatch.setattr(files.os, name, call)

    def opened(arguments, descriptor):
        names[descriptor] = os.path.basename(arguments[0])
        return names[descriptor]

    watch("open", opened)
    watch("fsync", lambda arguments, _: names[arguments[0]])
    watch("replace", lambda arguments, _: os.path.basename(arguments[1]))
    return made


def test_the_file_is_synced_before_it_has_its_name_and_the_folder_after(tmp_path, calls):
    write_file(tmp_path / "a.txt", "content")
    assert (tmp_path / "a.txt").read_text() == "content"
    folder = tmp_path.name
    assert calls == [
        *[("open", ".a.txt.part"), ("fsync", ".a.txt.part"), ("replace", "a.txt")],
        *[("open", folder), ("fsync", folder)],
    ]


def test_new_folders_are_synced_too(tmp_path, calls):
    write_file(tmp_path / "new/inner/a.txt", b"content")
    synced = [name for call, name in calls if call == "fsync"]
    assert synced == [tmp_path.name, "new", ".a.txt.part", "inner"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("name", CALLS)
def test_what_fails_on_the_way_keeps_what_was_there(tmp_path, monkeypatch, name, number):
    path = tmp_path / "a.txt"
    write_file(path, "old")
    real = getattr(os, name)

    def fail(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, name, fail)
    with pytest.raises(UserError, match="is full" if number == errno.ENOSPC else r"a\.txt cannot be written"):
        write_file(path, "new")
    monkeypatch.setattr(files.os, name, real)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_is_told_whatever_a_library_makes_of_it(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="is full"), replacing(tmp_path / "a.pth") as part:
        part._file.close()
        part._file = Full()
        try:
            part.write(b"x")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:626]") from None
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_passed_on_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as part:
        part.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_is_of_what_was_written(tmp_path):
    with replacing(tmp_path / "a") as part:
        part.write(b"one")
        part.write(memoryview(b"two"))
    assert part.sha256.hexdigest() == hashlib.sha256(b"onetwo").hexdigest()
    assert part.size == 6


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    (tmp_path / ".a.txt.part").write_text("a longer text that was never finished")
    write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_writers_of_one_file_take_turns(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    contents = {str(i) * 100_000 for i in range(8)}
    threads = [threading.Thread(target=write_file, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]
    # one that stands still is not waited for without end
    monkeypatch.setattr(files, "_LONGEST_WAIT_SECONDS", 0.05)
    with open(tmp_path / ".b.txt.part", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            write_file(tmp_path / "b.txt", "new")


def test_a_link_in_the_part_s_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".a.part").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"):
        write_file(tmp_path / "a", "new")
    assert (tmp_path / "precious").read_text() == "kept"


def test_names_as_long_as_a_disk_allows(tmp_path):
    path = tmp_path / ("ä" * 127)
    write_file(path, "x")
    assert list(tmp_path.iterdir()) == [path]


def test_json_and_removal(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1, (2.5, float("-inf"))]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": null,\n "b": [\n  1,\n  [\n   2.5,\n   null\n  ]\n ]\n}\n'
    remove_file(tmp_path / "a.json")
    remove_file(tmp_path / "a.json")
    remove_file(tmp_path / "no folder/a.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be removed"):
        remove_file(tmp_path / "folder")


def test_a_folder_has_its_name_once_all_in_it_is_on_the_disk(tmp_path, monkeypatch):
    part = tmp_path / "part"
    (part / "inner").mkdir(parents=True)
    (part / "inner/a").write_text("a")
    (part / "b").write_text("b")
    synced = []
    real = os.fsync

    def sync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "whole").exists()))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", sync)
    publish_folder(part, tmp_path / "whole")
    before = {os.path.relpath(path, part) for path, renamed in synced if not renamed}
    assert before == {".", "b", "inner", "inner/a"}
    assert [path for path, renamed in synced if renamed] == [str(tmp_path)]


def test_a_file_of_a_library_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "part.mp4").write_bytes(b"film")
    synced = []
    real = os.fsync

    def sync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", sync)
    publish_file(tmp_path / "part.mp4", tmp_path / "a.mp4")
    assert synced == [str(tmp_path / "part.mp4"), str(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("before", "after"), [(b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"a", b""), (b"a\n\0\0", b"a\n")]
)
def test_a_torn_line_goes(tmp_path, before, after):
    path = tmp_path / "lines"
    path.write_bytes(before)
    drop_torn_line(path)
    assert path.read_bytes() == after


def test_a_torn_line_that_cannot_go_is_told(tmp_path):
    drop_torn_line(tmp_path / "none")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        drop_torn_line(tmp_path)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file", "--output {}/file: {}/file is a file; name a folder"),
        ("file/below/it", "--output {}/file/below/it: {}/file is a file; name a folder"),
        ("nowhere", "--output {}/nowhere: {}/nowhere is a file; name a folder"),
        ("x" * 300, "File name too long: name another"),
        ("/proc/here", "--output /proc/here cannot be written: "),
        ("a\nb", "without characters that do not print"),
    ],
)
def test_folders_that_cannot_be_written_are_told_before_any_work(tmp_path, place, words):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError) as raised:
        check_folder(tmp_path / place, "--output")
    assert words.replace("{}", str(tmp_path)) in str(raised.value)


def test_a_folder_that_can_be_made_is_not_made_by_the_look_at_it(tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path)
    for place in (tmp_path, tmp_path / "new/inner", tmp_path / "linked/new", tmp_path / "linked"):
        check_folder(place, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["linked"]


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (tmp_path / "file", tmp_path / "file/below", tmp_path / "link"):
        with pytest.raises(UserError, match=r"(file|link) is there, and is no folder"):
            make_folder(folder)
