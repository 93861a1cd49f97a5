"""Options of the machine: checked before any work, recorded, and used again by rerun."""

from pathlib import Path

import pytest

from gesso.metadata import read_record, save_picture
from gesso.pictures import read_pixels
from tests.unit.cli.running import call

PROMPT = "a red star"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "int8"), 'dtype "int8" is not a dtype that is known; one of: float32, bfloat16, float16'),
        (("--device", "gpu"), 'device "gpu" is not a device\'s name; one of: cpu, cuda, cuda:1, mps'),
        (("--device", "cuda:77"), 'device "cuda:77" is not a device of this machine; there'),
        (
            ("--device", "cpu", "--attention", "fast"),
            'attention "fast" is not an attention kernel; cpu has sdpa, math, flex (with --compile); cudnn',
        ),
        (
            ("--device", "cpu", "--attention", "flash"),
            "needs an NVIDIA GPU of compute capability 8.0 or more; cpu has",
        ),
        (("--device", "cpu", "--attention", "flex"), "so give --compile"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_what_is_not_possible_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, options: tuple[str, ...], said: str
) -> None:
    models = ("--model", "infinity-nano", "--model", "flux-nano") if command == "compare" else ()
    run = call(capsys, command, PROMPT, *models, *options, "-o", str(tmp_path))
    assert run.status == 2
    assert [line for line in run.err.splitlines() if said in line] == [run.err.splitlines()[-1]]
    assert not list(tmp_path.iterdir())


def test_plans_are_of_the_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    def memory(*options: str) -> str:
        lines = call(capsys, "plan", PROMPT, "--model", "flux-nano", *options).out.splitlines()
        return next(line for line in lines if line.startswith("memory"))

    assert memory() == memory("--dtype", "fp32") != memory("--dtype", "bf16")
    assert call(capsys, "plan", PROMPT, "--device", "cuda:77").status == 2


def test_rerun_paints_by_the_record(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ("--dtype", "bfloat16", "--attention", "math", "--device", "cpu", "--seed", "7", "-o", str(tmp_path))
    path = Path(call(capsys, "generate", PROMPT, *given).out.strip())
    record = read_record(path)
    assert (record.data["dtype"], record.data["attention"], record.data["compiled"]) == ("bfloat16", "math", False)
    run = call(capsys, "rerun", str(path), "--device", "cpu")
    assert (run.status, run.out.strip()) == (0, "equal")
    assert " was " not in run.err
    assert "attention math, not compiled" in call(capsys, "show", str(path)).out


def test_rerun_says_what_this_machine_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = Path(call(capsys, "generate", PROMPT, "--seed", "7", "--device", "cpu", "-o", str(tmp_path)).out.strip())
    other = {**read_record(path).data, "attention": "flash3"}
    save_picture(read_pixels(path), tmp_path / "other.png", other)
    run = call(capsys, "rerun", str(tmp_path / "other.png"), "--device", "cpu")
    assert (run.status, run.out.strip()) == (0, "equal")
    assert "attention was flash3, is sdpa" in run.err
