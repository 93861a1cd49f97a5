"""Lists of checksums: any text is read, what is written is read back, and no name leads out of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.errors import FileError
from gesso.weights import checksums

NAMES = st.from_regex(r"[a-z0-9_][a-z0-9_./-]{0,20}", fullmatch=True)
DIGESTS = st.from_regex(r"[0-9a-f]{32}|[0-9a-f]{64}", fullmatch=True)


@given(st.text(max_size=200))
def test_any_text_is_a_list(text: str) -> None:
    listed = checksums.parse(text)
    assert all(name and not name[0].isspace() for name in listed.digests)
    assert all(len(line.split()) > 2 for line in listed.skipped)


@given(st.dictionaries(NAMES, st.none() | DIGESTS, max_size=8))
def test_what_is_written_is_read_back(digests: dict[str, str | None]) -> None:
    assert checksums.parse(checksums.write(digests)).digests == digests


def test_blanks_in_a_path_are_refused() -> None:
    with pytest.raises(FileError, match="has blanks in its path"):
        checksums.write({"a b": "0" * 32})


def test_digests_in_capitals(tmp_path: Path) -> None:
    """The published code takes them for damage; here they are the same, unless its way is asked for."""
    (tmp_path / "a").write_bytes(b"x")
    listed = checksums.parse(f"{checksums.digest(tmp_path / 'a').upper()} a")
    assert checksums.check(tmp_path, listed).fine
    assert checksums.check(tmp_path, listed, case_matters=True).altered == ("a",)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "link"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(FileError, match="does not lie in it"):
        checksums.check(folder, checksums.parse(f"{'0' * 32} {name}"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * ((1 << 20) + 1)])
def test_files_that_are_no_list(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.txt").write_bytes(content)
    with pytest.raises(FileError, match="so it is no list of checksums"):
        checksums.read(tmp_path / "manifest.txt")
