"""Files and folders that are written whole or not at all, never over another one unasked."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import full_disk
from processes import DYING

from common import files
from common.files import FileError, Whole, make_folder, unused_path, write_new, write_whole

ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    """{name: content} of all files below a folder, hidden ones, too; of folders None."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


# ---------------------------------------------------------------- Whole


def test_a_file_has_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folders" / "results.json"
    with Whole(path) as file:
        assert not path.exists()
        assert file.part.parent == path.parent
        assert file.part.name.startswith(".")
        assert file.part.suffix == ".json"  # writers of videos and pictures go by it
        file.part.write_text("half")
        assert contents(tmp_path)["new/folders/" + file.part.name] == "half"
        assert not path.exists()
        file.part.write_text("whole")
    assert contents(path.parent) == {"results.json": "whole"}
    assert file.path == path


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_removes_what_was_written(tmp_path, raised, overwrite):
    if overwrite:
        (tmp_path / "x.txt").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(raised), Whole(tmp_path / "x.txt", overwrite=overwrite) as file:
        file.part.write_text("half")
        raise raised
    assert contents(tmp_path) == before


def test_an_exception_removes_a_folder_with_its_files(tmp_path):
    with pytest.raises(ValueError), Whole(tmp_path / "model") as folder:
        (folder.part / "variables").mkdir(parents=True)
        (folder.part / "variables" / "x").write_text("half")
        raise ValueError
    assert contents(tmp_path) == {}


def test_an_existing_file_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    message = r"x\.txt exists already: choose another path, or move it away"
    with pytest.raises(FileError, match=message), Whole(tmp_path / "x.txt"):
        pytest.fail("the block runs")
    assert contents(tmp_path) == {"x.txt": "old"}


def test_a_link_to_nowhere_is_in_the_way_too(tmp_path):
    (tmp_path / "x.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(FileError, match="exists already"), Whole(tmp_path / "x.txt"):
        pytest.fail("the block runs")


def test_overwriting_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    with Whole(tmp_path / "x.txt", overwrite=True) as file:
        file.part.write_text("new")
        assert (tmp_path / "x.txt").read_text() == "old"
    assert contents(tmp_path) == {"x.txt": "new"}


@pytest.mark.parametrize("with_links", [True, False])
def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path, monkeypatch, with_links):
    if not with_links:
        monkeypatch.setattr(os, "link", refuse_links)
    with pytest.raises(FileError, match=r"x\.txt exists already"), Whole(tmp_path / "x.txt") as file:
        file.part.write_text("mine")
        (tmp_path / "x.txt").write_text("another's")
    assert contents(tmp_path) == {"x.txt": "another's"}


def refuse_links(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_file_that_comes_at_the_last_moment_is_not_replaced(tmp_path, monkeypatch):
    link = os.link

    def late(source, target):
        Path(target).write_text("another's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileError, match=r"x\.txt exists already"):
        write_whole(tmp_path / "x.txt", "mine", overwrite=False)
    assert contents(tmp_path) == {"x.txt": "another's"}


def test_a_file_system_without_links_does(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    write_whole(tmp_path / "x.txt", "new", overwrite=False)
    assert contents(tmp_path) == {"x.txt": "new"}


def test_where_the_name_is_taken_meanwhile_a_numbered_file_takes_the_next(tmp_path):
    with Whole(tmp_path / "x.txt", numbered=True) as file:
        file.part.write_text("mine")
        (tmp_path / "x.txt").write_text("another's")
        (tmp_path / "x-1.txt").write_text("a third's")
    assert file.path == tmp_path / "x-2.txt"
    assert contents(tmp_path) == {"x.txt": "another's", "x-1.txt": "a third's", "x-2.txt": "mine"}
    with Whole(tmp_path / "y.txt", numbered=True) as file:
        file.part.write_text("alone")
    assert file.path == tmp_path / "y.txt"


def test_a_numbered_file_does_not_begin_under_a_name_that_is_taken(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(FileError, match="exists already"), Whole(tmp_path / "x.txt", numbered=True):
        pytest.fail("the block runs")


def test_a_folder_has_its_name_when_it_is_complete(tmp_path):
    with Whole(tmp_path / "model") as folder:
        folder.part.mkdir()
        (folder.part / "graph").write_text("half")
        assert not (tmp_path / "model").exists()
        (folder.part / "graph").write_text("whole")
    assert contents(tmp_path) == {"model": None, "model/graph": "whole"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_replaces_nothing_that_came_meanwhile(tmp_path, kind):
    with pytest.raises(FileError, match=r"cannot write .*model"), Whole(tmp_path / "model") as folder:
        folder.part.mkdir()
        (folder.part / "graph").write_text("mine")
        if kind == "folder":
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "graph").write_text("another's")
        else:
            (tmp_path / "model").write_text("another's")
    assert "another's" in contents(tmp_path).values()
    assert "mine" not in contents(tmp_path).values()
    assert not list(tmp_path.glob(".*"))


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileError, match=r"cannot write .*x\.txt: No such file"), Whole(tmp_path / "x.txt"):
        pass
    assert contents(tmp_path) == {}


def test_a_place_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"cannot write .*file/x\.txt: (Not a directory|File exists)"
    with pytest.raises(FileError, match=message) as error, Whole(tmp_path / "file" / "x.txt"):
        pytest.fail("the block runs")
    assert error.value.exit_code == 2
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_what_was_there(tmp_path, old):
    if old:
        (tmp_path / "x.txt").write_text(old)
    before = contents(tmp_path)
    with full_disk(1000), pytest.raises(FileError, match=r"cannot write .*x\.txt: File too large"):
        write_whole(tmp_path / "x.txt", "x" * 1001)
    assert contents(tmp_path) == before
    with full_disk(1000):
        write_whole(tmp_path / "x.txt", "x" * 1000)
    assert (tmp_path / "x.txt").read_text() == "x" * 1000


def test_what_cannot_be_flushed_gets_no_name(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(FileError, match=r"cannot write .*x\.txt: Input/output error"):
        write_whole(tmp_path / "x.txt", "new")
    assert contents(tmp_path) == {}


KILLED = (
    DYING
    + """
import sys
sys.path.insert(0, {root!r})
from common.files import write_whole
os.replace, os.link, os.open, os.fsync, os.close, os.unlink = map(
    dying, (os.replace, os.link, os.open, os.fsync, os.close, os.unlink))
die_everywhere(lambda number: write_whole(f"{folder}/{{number}}/x.txt", "new", overwrite={overwrite}))
"""
)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment_the_file_is_absent_or_old_or_new(tmp_path, overwrite):
    before, paths = "old" if overwrite else None, [tmp_path / str(number) / "x.txt" for number in range(1, 31)]
    for path in paths:
        path.parent.mkdir()
        if overwrite:
            path.write_text("old")
    script = KILLED.format(root=str(ROOT), folder=str(tmp_path), overwrite=overwrite)
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    found = [path.read_text() if path.exists() else None for path in paths]
    assert set(found) == {before, "new"}
    num_moments = max(number for number, content in enumerate(found, 1) if content == "new")
    assert found[:num_moments] == sorted(found[:num_moments], key=lambda content: content == "new")
    assert num_moments > 3
    for path in paths:
        leftovers = set(path.parent.iterdir()) - {path}
        assert all(left.name.startswith(".") for left in leftovers)


def test_what_is_written_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace", "link"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, function=function: (events.append(name), function(*args))[1]
        )
    write_whole(tmp_path / "x.txt", "text")
    write_whole(tmp_path / "y.txt", b"bytes", overwrite=False)
    assert events == ["fsync", "replace", "fsync", "link"]
    assert contents(tmp_path) == {"x.txt": "text", "y.txt": "bytes"}


def test_what_need_not_be_durable_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited"))
    write_whole(tmp_path / "x.txt", "text", durable=False)
    write_new(tmp_path / "x.png", {".png": b"picture", ".json": b"results"})
    assert contents(tmp_path) == {"x.txt": "text", "x.png": "picture", "x.json": "results"}


@pytest.mark.parametrize("fails", [False, True])
def test_flushing_closes_what_it_opens(tmp_path, monkeypatch, fails):
    opened, closed, close = [], [], os.close

    def fsync(descriptor):
        opened.append(descriptor)
        if fails:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor)))
    with pytest.raises(OSError, match="Input/output") if fails else contextlib.nullcontext():
        files.flush(tmp_path)
    assert len(opened) == 1
    assert closed == opened


def test_an_error_without_a_number_is_told_by_its_text(tmp_path):
    with pytest.raises(FileError, match=r"^cannot write x\.txt: the library says so$"), files.writing("x.txt"):
        raise OSError("the library says so")


def test_two_threads_that_write_at_one_path_do_not_meet(tmp_path):
    with Whole(tmp_path / "x.txt", overwrite=True) as first, Whole(tmp_path / "x.txt", overwrite=True) as second:
        first.part.write_text("first")
        second.part.write_text("second, and longer")
    assert contents(tmp_path) == {"x.txt": "first"}  # which ends last


def test_text_is_utf8(tmp_path):
    write_whole(tmp_path / "x.txt", "häuschen\n")
    assert (tmp_path / "x.txt").read_bytes() == "häuschen\n".encode()


# ---------------------------------------------------------------- names


def test_unused_path_is_the_first_number_that_is_free_with_all_suffixes(tmp_path):
    path = tmp_path / "x.png"
    assert unused_path(path) == path
    assert unused_path(str(path)) == path
    path.write_text("")
    (tmp_path / "x-1.png").symlink_to("gone")
    (tmp_path / "x-2.json").write_text("")
    assert unused_path(path) == tmp_path / "x-2.png"
    assert unused_path(path, suffixes=[".json"]) == tmp_path / "x-3.png"
    (tmp_path / "x-3.json").symlink_to("gone")
    assert unused_path(path, suffixes=[".txt", ".json"]) == tmp_path / "x-4.png"


def test_new_files_share_the_first_name_that_is_free(tmp_path):
    written = {".png": b"picture", ".json": b"results"}
    assert write_new(tmp_path / "out" / "x.png", written) == tmp_path / "out" / "x.png"
    assert write_new(tmp_path / "out" / "x.png", written) == tmp_path / "out" / "x-1.png"
    (tmp_path / "out" / "x-2.json").write_text("another's")
    assert write_new(tmp_path / "out" / "x.png", written) == tmp_path / "out" / "x-3.png"
    assert contents(tmp_path / "out") == {
        **{f"x{number}.png": "picture" for number in ("", "-1", "-3")},
        **{f"x{number}.json": "results" for number in ("", "-1", "-3")},
        "x-2.json": "another's",
    }


@pytest.mark.parametrize("taken", [".png", ".json"])
def test_where_one_of_new_files_is_taken_at_the_last_moment_all_get_the_next_number(tmp_path, monkeypatch, taken):
    unused = files.unused_path

    def another_is_faster(path, **options):
        free = unused(path, **options)
        if free == path:
            free.with_suffix(taken).write_text("another's")
        return free

    monkeypatch.setattr(files, "unused_path", another_is_faster)
    path = write_new(tmp_path / "x.png", {".png": b"picture", ".json": b"results"})
    assert path == tmp_path / "x-1.png"
    assert contents(tmp_path) == {f"x{taken}": "another's", "x-1.png": "picture", "x-1.json": "results"}


@pytest.mark.parametrize("large", [".png", ".json"])
def test_of_new_files_for_which_the_disk_is_too_full_none_stays(tmp_path, monkeypatch, large):
    tries = iter([tmp_path / "x.png"])
    monkeypatch.setattr(files, "unused_path", lambda *_, **__: next(tries))  # another name would be as full
    written = {suffix: b"x" * (2000 if suffix == large else 10) for suffix in (".png", ".json")}
    with full_disk(1000), pytest.raises(FileError, match=rf"cannot write .*x\{large}: File too large"):
        write_new(tmp_path / "x.png", written)
    assert contents(tmp_path) == {}


# ---------------------------------------------------------------- folders


def test_make_folder_takes_new_and_empty_ones(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(FileError, match="a exists already: choose another path"):
        make_folder(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file exists already"):
        make_folder(tmp_path / "file")
    with pytest.raises(FileError, match="cannot write .*file/below"):
        make_folder(tmp_path / "file" / "below")


def test_remove_takes_files_folders_links_and_nothing(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("folder", "file", "link", "nothing"):
        files.remove(tmp_path / name)
    assert sorted(contents(tmp_path)) == ["kept", "kept/file"]
