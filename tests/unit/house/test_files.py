"""Nothing is left half-written, folders are proved before work, names stay free."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gesso.errors import FileError, RunError
from gesso.files import ready_folder, written_aside, written_under_free_name


def test_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    target.write_text("old")
    with written_aside(target) as aside:
        aside.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_follow_the_file_mask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with written_aside(tmp_path / "note.txt") as aside:
            aside.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("problem", [ValueError("broken"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path: Path, problem: BaseException) -> None:
    def fail() -> None:
        with written_aside(tmp_path / "note.txt") as aside:
            aside.write_text("half")
            raise problem

    with pytest.raises(type(problem)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_run_error_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with written_aside(tmp_path / "note.txt") as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match="no space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_really_refuses_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk: the write itself fails, half-way."""
    code = f"""
import resource, sys
from pathlib import Path
from PIL import Image
from gesso.errors import RunError
from gesso.metadata import save_picture
picture = Image.effect_noise((200, 200), 90).convert("RGB")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_picture(picture, Path({str(tmp_path)!r}) / "a.png", None)
except RunError as error:
    sys.exit(77)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 77
    assert list(tmp_path.iterdir()) == []


# Tests may run as root, who may write anywhere; below a file nobody may.
def test_unwritable_folders_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "below"):
        with pytest.raises(FileError, match="cannot be written to"):
            ready_folder(folder)
    with pytest.raises(FileError, match="cannot be written to"), written_aside(file / "below.txt"):
        pass


def test_ready_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = ready_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_free_names_count_up(tmp_path: Path) -> None:
    path = tmp_path / "a.b.png"

    def written(text: str) -> str:
        return written_under_free_name(path, lambda aside: aside.write_text(text)).name

    assert written("first") == "a.b.png"
    assert written("second") == "a.b-2.png"
    (tmp_path / "a.b-3.png").symlink_to("nowhere")  # a dangling link is a name in use
    assert written("fourth") == "a.b-4.png"
    assert path.read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 4  # and nothing beside them


def test_free_names_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "a.png"
    path.write_text("old")
    assert written_under_free_name(path, lambda aside: aside.write_text("new")) == tmp_path / "a-2.png"
    assert (path.read_text(), (tmp_path / "a-2.png").read_text()) == ("old", "new")
    assert len(list(tmp_path.iterdir())) == 2


def test_refusals_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        with written_aside(aside):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(aside: Path) -> None:
        raise FileError(aside, "its metadata does not fit", "use png")

    path = tmp_path / "a.png"
    for write, kind in ((fill, RunError), (refuse, FileError)):
        with pytest.raises(kind, match=f"^{path}: "):
            written_under_free_name(path, write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_two_processes_keep_every_picture(tmp_path: Path, links: bool) -> None:
    code = f"""
import os, sys
from pathlib import Path
from gesso.files import written_under_free_name
if not {links}:
    def link(source, target):
        raise PermissionError
    os.link = link
path = Path({str(tmp_path)!r}) / "a.png"
sys.stdin.readline()
for number in range(20):
    written_under_free_name(path, lambda aside: aside.write_text(sys.argv[1] + str(number)))
"""
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen([*command, name], stdin=subprocess.PIPE, text=True) for name in ("one", "two")]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    texts = sorted(path.read_text() for path in tmp_path.iterdir())
    assert texts == sorted(f"{name}{number}" for name in ("one", "two") for number in range(20))
