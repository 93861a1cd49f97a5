"""Parts of the command line that need no model: names, prompts, sizes, comparison of pictures."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gesso.cli.names import DEFAULT_TEMPLATE, check_template, picture_name, slug
from gesso.cli.options import check_fields, drawn_seed, request_fields
from gesso.cli.prompts import read_prompts
from gesso.cli.show import DIFFERENT, EQUAL, WITHIN, compare_frames
from gesso.errors import FileError, RequestError


@pytest.mark.parametrize(
    "template",
    [
        "../{index}",
        "/tmp/{index}",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "",
        "{slug}/x",
        "{unknown}",
        "{index.__class__}",
        "{index[0]}",
        "{0}",
        "{}",
        "{index",
        "{index:999999999}",
        "{index:>9}",
        "{index!r}",
        "{seed:x^2}",
        "a\nb",
        "a\0b",
        "x" * 300,
    ],
)
def test_templates_that_leave_the_folder_or_make_no_sense_are_refused(template: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_template(template)
    assert caught.value.field == "name"


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, "{seed}", "fixed", "{image:2}_{model}", "{{x}}-{index}"])
def test_good_templates_pass(template: str) -> None:
    check_template(template)


@given(st.text(max_size=2000))
def test_any_prompt_makes_a_safe_name(prompt: str) -> None:
    name = picture_name(DEFAULT_TEMPLATE, index=1, image=0, seed=2**63 - 1, prompt=prompt, model=prompt)
    assert Path(name).name == name
    assert len(name.encode()) <= 200


def test_slug_keeps_whole_words() -> None:
    assert slug("Two red Stars, above a ring!") == "two-red-stars-above-a-ring"
    assert slug("word " * 40).endswith("word")
    assert slug("!?") == "picture"


def test_prompts_from_arguments_input_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \r\nthree", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("four\n\nfive\n"))
    assert read_prompts(["zero", f"@{tmp_path / 'p.txt'}", "-"]) == ["zero", "one", "two", "three", "four", "five"]


def test_prompts_end_where_lines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a star\u2028on a hill", "a\u2029ring", "a\u0085square"]  # as they come from other programs
    (tmp_path / "p.txt").write_bytes("\r\n".join(texts).encode())
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts)))
    assert read_prompts([f"@{tmp_path / 'p.txt'}", "-"]) == texts * 2


def test_bad_prompt_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.bin").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "p.bin"):
        with pytest.raises(FileError, match=path.name):
            read_prompts([f"@{path}"])
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="prompt"):
        read_prompts([f"@{tmp_path / 'empty.txt'}"])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"size": "1024x768"}, (1024, 768)),
        ({"size": " 64X48 "}, (64, 48)),
        ({"aspect": "3:2", "megapixels": "1"}, (1232, 816)),
        ({"megapixels": "1"}, (992, 992)),
        ({"aspect": "1:1"}, (64, 64)),
        ({"aspect": "2:1"}, (96, 48)),
        ({"aspect": "16:9", "megapixels": "0.001"}, (40, 24)),
    ],
)
def test_ways_to_say_the_size(options: dict[str, object], size: tuple[int, int]) -> None:
    fields = request_fields(options, (64, 64))
    assert (fields["width"], fields["height"]) == size


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"size": "big"}, "size"),
        ({"size": "64"}, "size"),
        ({"size": "64x64", "width": 64}, "size"),
        ({"size": "64x64", "aspect": "1:1"}, "size"),
        ({"height": 64, "megapixels": "1"}, "size"),
        ({"aspect": "0:1"}, "aspect"),
        ({"aspect": "1:1000"}, "aspect"),
        ({"aspect": "wide"}, "aspect"),
        ({"megapixels": "nan"}, "megapixels"),
        ({"megapixels": "-1"}, "megapixels"),
        ({"megapixels": "many"}, "megapixels"),
        ({"guidance": "1,,2"}, "guidance"),
    ],
)
def test_sizes_and_lists_that_cannot_be_read_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_fields(options)
    assert caught.value.field == field


def test_not_a_number_is_refused_by_the_schema() -> None:
    with pytest.raises(RequestError, match="guidance nan"):
        check_fields(request_fields({"guidance": "nan"}))
    with pytest.raises(RequestError, match='guidance "strong" is not a number from 0 to 100'):
        check_fields(request_fields({"guidance": "strong"}))
    with pytest.raises(RequestError, match="temperature"):
        check_fields(request_fields({"temperature": "1,inf"}))


def test_lists_and_numbers() -> None:
    options = {"guidance": "1, 2.5,3", "temperature": "0.5", "seed": None, "top_k": "7", "deterministic": True}
    fields = request_fields(options)
    assert fields == {"guidance": (1.0, 2.5, 3.0), "temperature": 0.5, "top_k": 7, "deterministic": True}


def test_drawn_seeds_are_seeds() -> None:
    assert all(0 <= drawn_seed() < 2**31 for _ in range(100))


@pytest.mark.parametrize(("difference", "verdict"), [(0, EQUAL), (1, WITHIN), (8, WITHIN), (9, DIFFERENT)])
def test_verdicts(difference: int, verdict: str) -> None:
    old, new = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (8, 8), (100, 100, 100))
    new.putpixel((3, 3), (100, 100 + difference, 100))
    compared = compare_frames([new], [old])
    assert compared.verdict == verdict
    assert compared.largest == difference
    assert str(compared) == (f"equal within {difference}/255" if verdict == WITHIN else verdict)


def test_other_sizes_are_different() -> None:
    assert compare_frames([Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 9))]).verdict == DIFFERENT
