"""Contact sheets: size, place of the pictures, and captions that fit."""

from PIL import Image, ImageFont

from gesso.sheets import Group, contact_sheet, wrapped


def test_sheet_holds_every_picture() -> None:
    red, blue = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (128, 64), "#0000ff")
    sheet = contact_sheet([Group(caption="red, then blue", pictures=[red, blue])] * 5, title="T", columns=2, side=100)
    count = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    assert 5 * 100 * 100 * 0.9 < count[255, 0, 0] <= 5 * 100 * 100
    assert 5 * 100 * 50 * 0.9 < count[0, 0, 255] <= 5 * 100 * 50  # shape kept, not stretched


def test_captions_fit_and_say_where_they_were_cut() -> None:
    font = ImageFont.load_default(19)
    lines = wrapped("word " * 60 + "x" * 300, font, 300, 2)
    assert len(lines) == 2
    assert all(font.getlength(line) <= 300 for line in lines)
    assert lines[-1].endswith("…")
    assert wrapped("x" * 300, font, 300, 2)[0].endswith("…")
    assert wrapped("short", font, 300, 2) == ["short"]
