"""The predictor over a real engine and tiny SDXLs: what calls name, files that come out, cancelling, safety."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gesso.adapters.sources import parse
from gesso.engine import Engine
from gesso.errors import FileError, GessoError, RejectedError, RequestError
from gesso.metadata import read_record
from gesso.pipelines.sdxl import SdxlPipeline
from gesso.serving.flux_compatible import FluxCompatibleInput, parse_input
from gesso.serving.given_files import Fetching, given_lora, given_pictures
from gesso.serving.predictor import FluxCompatiblePredictor, OutputFolders, Prediction, PredictorSettings
from tests.adapter_server import Page, Site, served, tar
from tests.tiny_safety import write_checker
from tests.tiny_sdxl import tiny_guest, tiny_pipeline, write_sdxl_lora

SMALL = {"width": 256, "height": 256, "num_inference_steps": 1, "output_format": "png"}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GESSO_SAFETY", "off")
    monkeypatch.setenv("GESSO_ALLOW_PRIVATE_ADDRESSES", "1")
    monkeypatch.setattr("gesso.adapters.sources_sites.PAUSE", 0.01)


@pytest.fixture(scope="module")
def sdxl() -> SdxlPipeline:
    return tiny_pipeline()


@pytest.fixture
def predictor(tmp_path: Path, sdxl: SdxlPipeline) -> Iterator[FluxCompatiblePredictor]:
    made = FluxCompatiblePredictor(
        PredictorSettings(lora_folder=tmp_path / "loras"),
        Engine(device="cpu", load=lambda name, device, dtype: sdxl),
    )
    yield made
    made.close()


class Lines(list[str]):
    """What was said, and the errors of the loop's thread would show."""

    def __call__(self, line: str) -> None:
        self.append(line)


def call(predictor: FluxCompatiblePredictor, say: Lines | None = None, **values: Any) -> Prediction:
    given, _ = parse_input({"prompt": "a red star", "seed": 7, **SMALL, **values})
    return asyncio.run(predictor.run(given, say if say is not None else Lines()))


def pixels(made: Prediction) -> list[bytes]:
    return [Image.open(path).convert("RGB").tobytes() for path in made.files]


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(target, "png")
    return target.getvalue()


# ---- pictures out ---------------------------------------------------------------------------------------------------


def test_several_outputs_each_can_be_made_alone(predictor: FluxCompatiblePredictor) -> None:
    say = Lines()
    together = call(predictor, say, num_outputs=3)
    assert together.seeds == (7, 8, 9)
    assert [path.name for path in together.files] == ["out-0.png", "out-1.png", "out-2.png"]
    alone = call(predictor, seed=8)
    one, other = (np.asarray(Image.open(path), dtype=int) for path in (together.files[1], alone.files[0]))
    assert np.abs(one - other).max() <= 8  # but for sums in batches of other shapes
    assert say[-1] == "seed: 7, 8, 9"
    assert [line for line in say if "%|" in line][-1] == f"100%|{'#' * 20}| 3/3"


@pytest.mark.parametrize(("name", "ending", "kind"), [("webp", ".webp", "WEBP"), ("jpg", ".jpeg", "JPEG")])
def test_formats(predictor: FluxCompatiblePredictor, name: str, ending: str, kind: str) -> None:
    sizes = []
    for quality in (0, 100):
        made = call(predictor, output_format=name, output_quality=quality)
        assert made.files[0].suffix == ending
        with Image.open(made.files[0]) as written:
            assert written.format == kind
        sizes.append(made.files[0].stat().st_size)
    assert sizes[0] < sizes[1]


def test_a_drawn_seed_is_reported_and_makes_the_same_picture(predictor: FluxCompatiblePredictor) -> None:
    drawn = call(predictor, seed=-1)
    assert pixels(call(predictor, seed=drawn.seeds[0])) == pixels(drawn)
    assert read_record(drawn.files[0]).seed == drawn.seeds[0]


def test_the_watermark_can_be_read(predictor: FluxCompatiblePredictor) -> None:
    plain, made = call(predictor), call(predictor, apply_watermark=True)
    with Image.open(made.files[0]) as marked, Image.open(plain.files[0]) as unmarked:
        seen, without = np.asarray(marked, dtype=float), np.asarray(unmarked, dtype=float)
    assert np.abs(seen - without).mean() < 1
    assert read_record(made.files[0]).data["watermark"] == "sdxl"
    bits = [int(bit) for bit in bin(0b101100111110110010010000011110111011000110011110)[2:]]
    assert (watermark_of(seen) == bits).mean() > 0.9 > (watermark_of(without) == bits).mean()


def watermark_of(rgb_HW3: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """48 bits, each by the majority of the blocks that say it; block by block, as the usual reader goes."""
    u_HW = 0.492 * (rgb_HW3[..., 2] - rgb_HW3 @ [0.299, 0.587, 0.114]) + 128
    votes: list[list[bool]] = [[] for _ in range(48)]
    count = 0
    for row in range(0, u_HW.shape[0] - 7, 8):
        for column in range(0, u_HW.shape[1] - 7, 8):
            block = u_HW[row : row + 8, column : column + 8]
            half = (block[::2, ::2] + block[1::2, ::2] + block[::2, 1::2] + block[1::2, 1::2]) / 2
            votes[count % 48].append(bool(max(half.ravel()[1:]) % 36 > 18))
            count += 1
    return np.array([np.mean(each) > 0.5 for each in votes])


def test_files_of_earlier_calls_go() -> None:
    outputs = OutputFolders(kept=0)
    first, second = outputs.new(), outputs.new()
    outputs.finished(first)
    third = outputs.new()
    assert [path.is_dir() for path in (first, second, third)] == [False, True, True]
    outputs.close()
    assert not third.exists()


# ---- what a call names ----------------------------------------------------------------------------------------------


def test_a_given_picture_is_cut_and_not_stretched(predictor: FluxCompatiblePredictor, tmp_path: Path) -> None:
    wide = Image.new("RGB", (1024, 256), "black")
    wide.paste("white", (384, 0, 640, 256))  # the middle, which is what is left of it
    wide.save(tmp_path / "wide.png")
    Image.new("RGB", (256, 256), "white").save(tmp_path / "square.png")
    one, other = (
        call(predictor, image=data_uri((tmp_path / name).read_bytes()), prompt_strength=1)
        for name in ("wide.png", "square.png")
    )
    assert pixels(one) == pixels(other)
    assert not any("stretched" in warning for warning in one.warnings)
    assert pixels(one) != pixels(call(predictor))


def test_a_mask_keeps_the_rest(predictor: FluxCompatiblePredictor) -> None:
    marks, strokes = Image.new("L", (64, 64), 0), Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    files = io.BytesIO(), io.BytesIO()
    for each, target in zip((marks, strokes), files, strict=True):
        each.paste("white", (0, 0, 32, 64))  # on black, and on nothing
        each.save(target, "png")
    fields: dict[str, Any] = {"image": data_uri(picture(256, 256)), "num_inference_steps": 4, "prompt_strength": 0.9}
    masks: list[dict[str, Any]] = [{}, *({"mask": data_uri(target.getvalue())} for target in files)]
    whole, masked, drawn = (
        np.asarray(Image.open(call(predictor, **fields, **mask).files[0]).convert("RGB"), dtype=float) for mask in masks
    )
    kept = np.asarray(Image.open(call(predictor, **{**fields, "prompt_strength": 0.25}).files[0]), dtype=float)
    assert np.abs(masked[:, 160:] - kept[:, 160:]).mean() < np.abs(whole[:, 160:] - kept[:, 160:]).mean()
    assert not np.array_equal(masked, whole)
    assert np.array_equal(masked, drawn)
    record = read_record(call(predictor, **fields, **masks[1]).files[0])
    assert (record.request.init_image, record.request.mask) == ("data URI", "data URI")
    assert str(record.data["mask"]).startswith("sha256:")


def test_a_picture_from_an_address(predictor: FluxCompatiblePredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    content = picture(300, 256)
    with served(Site(pages={"/a.png": Page(content), "/away": Page(redirect="http://169.254.169.254/a.png")})) as site:
        fetched = call(predictor, image=f"{site.address}/a.png?token=secret", prompt_strength=1)
        assert read_record(fetched.files[0]).request.init_image == f"{site.address}/a.png"
        assert pixels(fetched) == pixels(call(predictor, image=data_uri(content), prompt_strength=1))
        with pytest.raises(GessoError, match=r"^image did not come: a redirect leads to http://169\.254\.169\.254"):
            call(predictor, image=f"{site.address}/away")
        with pytest.raises(GessoError, match=r"image did not come: 127\.0\.0\.1 answers with HTTP 404"):
            call(predictor, image=f"{site.address}/none.png")
        monkeypatch.delenv("GESSO_ALLOW_PRIVATE_ADDRESSES")
        with pytest.raises(RequestError, match=r'^image "http://127\.0\.0\.1" is not at a public address'):
            call(predictor, image=f"{site.address}/a.png")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("/etc/passwd", 'image "/etc/passwd" is not an address or a data URI of a picture'),
        ("file:///etc/passwd", 'image "file:///etc/passwd" is not an address or a data URI of a picture'),
        ("data:image/png;base64,@@@", 'image "data:image/png;base64,…" is not an address or a data URI'),
        ("data:image/png", 'image "data:image/png,…" is not an address or a data URI'),
        (data_uri(b"<html>"), 'image "data:image/png;base64" is not a picture'),
        (data_uri(picture(64, 64)[:60]), 'image "data:image/png;base64" is not a picture'),
    ],
)
def test_pictures_that_are_none(predictor: FluxCompatiblePredictor, value: str, words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        call(predictor, image=value)
    assert str(refusal.value).startswith(words)


def test_strips_are_refused_before_memory_runs_out(tmp_path: Path) -> None:
    fetching = Fetching(folder=tmp_path, stop=threading.Event())
    with pytest.raises(FileError, match=r"^image: has 60000x1 pixels, too long a strip to cover 1024x1024; crop"):
        given_pictures(data_uri(picture(60_000, 1)), None, (1024, 1024), fetching)
    with pytest.raises(
        RequestError, match=r'^mask "1x60000 pixels" is not of about the shape of image; image has 2000'
    ):
        given_pictures(data_uri(picture(2000, 500)), data_uri(picture(1, 60_000)), (256, 256), fetching)


def test_a_picture_that_is_nowhere_is_refused_without_its_secrets(tmp_path: Path) -> None:
    for text in ("ftp://h.org/a.png?token=secret", "h.org/a.png?token=secret"):
        with pytest.raises(RequestError, match=r'^image ".*h\.org/a\.png" is not an address') as refusal:
            given_pictures(text, None, (256, 256), Fetching(folder=tmp_path, stop=threading.Event()))
        assert "secret" not in str(refusal.value.as_dict())


def test_no_steps_are_left(predictor: FluxCompatiblePredictor) -> None:
    with pytest.raises(RequestError, match=r"prompt_strength 0\.0 is not enough to leave one of 1 steps"):
        call(predictor, image=data_uri(picture(256, 256)), prompt_strength=0)


# ---- LoRAs ----------------------------------------------------------------------------------------------------------


def test_a_lora_by_every_way_in(predictor: FluxCompatiblePredictor, tmp_path: Path) -> None:
    content = write_sdxl_lora(tmp_path / "loras" / "style.safetensors").read_bytes()
    plain = pixels(call(predictor))
    wanted = pixels(call(predictor, lora_weights="./style.safetensors"))
    assert wanted != plain
    with served(Site(pages={"/style.safetensors": Page(content)})) as site:
        address = f"{site.address}/style.safetensors?signature=secret"
        by_address = call(predictor, lora_weights=address)
        assert pixels(by_address) == wanted
        assert "secret" not in str(read_record(by_address.files[0]).data)
    archive = data_uri(tar({"lora.safetensors": content, "notes.txt": b"x"}), "application/x-tar")
    assert pixels(call(predictor, replicate_weights=archive)) == wanted
    assert pixels(call(predictor, loras=["style.safetensors"])) == wanted
    # Alone as the second one it acts as the second one says, and the scale counts once.
    half = pixels(call(predictor, lora_weights="style.safetensors", lora_scale=0.5))
    assert half not in (plain, wanted)
    assert pixels(call(predictor, extra_lora="style.safetensors", extra_lora_scale=0.5)) == half
    assert pixels(call(predictor, loras=["style.safetensors::0.5"])) == half
    assert pixels(call(predictor)) == plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_weights": "../secret.safetensors"}, 'lora_weights "../secret.safetensors" is not a file of the folder'),
        ({"extra_lora": "/etc/passwd"}, 'extra_lora "/etc/passwd" is not a file of the folder of LoRAs'),
        ({"lora_weights": "none.safetensors"}, 'lora_weights "none.safetensors" is not a file of the folder of LoRAs'),
        ({"lora_weights": "two words"}, 'lora_weights "two words" is not'),
        ({"loras": ["a/b::9z"]}, "scale"),
        ({"lora_weights": "a/b::0.5", "lora_scale": 2}, "lora_weights's scale 2.0 is not usable here"),
        ({"lora_weights": "a/b", "extra_lora": "replicate.com/a/b"}, "lora"),
        ({"lora_weights": "data:application/x-tar;base64,AAAA"}, "lora_weights"),
    ],
)
def test_loras_that_are_none(predictor: FluxCompatiblePredictor, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(GessoError) as refusal:
        call(predictor, **fields)
    assert str(refusal.value).startswith(words) or "lora_weights.safetensors" in str(refusal.value)


def test_a_bare_name_is_replicates_and_a_token_is_its_sites_own(
    predictor: FluxCompatiblePredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_sdxl_lora(tmp_path / "style.safetensors").read_bytes()
    asked = "/owner/style/_weights"
    with served(Site(pages={asked: Page(tar({"lora.safetensors": content}))})) as site:
        monkeypatch.setattr("gesso.adapters.sources_sites.REPLICATE", site.address)
        made = call(predictor, lora_weights="owner/style", hf_api_token="hf_secret", civitai_api_token="civitai_secret")
        assert any(each.path == asked for each in site.asked)
        assert "secret" not in str([each.headers for each in site.asked])
    assert pixels(made) != pixels(call(predictor))


@pytest.mark.parametrize("between", ["/", "/versions/", ":"])
def test_a_bare_name_with_a_version(tmp_path: Path, between: str) -> None:
    fetching = Fetching(folder=tmp_path, stop=threading.Event())
    made = given_lora("lora_weights", f"owner/style{between}{'ab' * 32}", None, fetching)
    assert made.source == f"replicate:owner/style@{'ab' * 32}"


def test_a_lora_that_came_by_a_token_is_a_file_wherever_the_home_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_sdxl_lora(tmp_path / "style.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GESSO_HOME", "home")
    with served(Site(pages={"/owner/style/_weights": Page(tar({"lora.safetensors": content}))})) as site:
        monkeypatch.setattr("gesso.adapters.sources_sites.REPLICATE", site.address)
        fetching = Fetching(folder=tmp_path, stop=threading.Event(), tokens={"replicate": "secret"})
        source = parse(given_lora("lora_weights", "owner/style", None, fetching).source)
    assert source.path is not None
    assert source.path.read_bytes() == content


# ---- models, cancelling, safety -------------------------------------------------------------------------------------


def test_the_standard_model_and_back(sdxl: SdxlPipeline) -> None:
    other = tiny_pipeline(prediction_type="v_prediction")
    models = {"illustrious-xl": sdxl, "sdxl": other}
    predictor = FluxCompatiblePredictor(engine=Engine(device="cpu", load=lambda name, device, dtype: models[name]))
    predictor.warm_up()
    try:
        first, standard, again = (
            pixels(call(predictor, use_standard_sdxl=switch, negative_prompt="")) for switch in (False, True, False)
        )
    finally:
        predictor.close()
    assert first == again != standard


def test_a_refiner_by_either_way(tmp_path: Path) -> None:
    refined = tiny_pipeline(refiner=tiny_guest())
    predictor = FluxCompatiblePredictor(engine=Engine(device="cpu", load=lambda name, device, dtype: refined))
    ways = ("no_refiner", "expert_ensemble_refiner", "base_image_refiner")
    fields = {"num_inference_steps": 4, "use_standard_sdxl": True, "high_noise_frac": 0.5, "refine_steps": 5}
    try:
        made = [call(predictor, refine=way, **fields) for way in ways]
        assert not [warning for each in made for warning in each.warnings if "refiner" in warning]
        assert len({pixels(each)[0] for each in made}) == 3
        over_illustrations = call(predictor, **{**fields, "use_standard_sdxl": False}, refine="base_image_refiner")
        assert any("spoils illustrations" in warning for warning in over_illustrations.warnings)
        with pytest.raises(RequestError, match=r"high_noise_frac 1\.0 is not low enough to leave one of 4 steps"):
            call(predictor, **{**fields, "high_noise_frac": 1}, refine="expert_ensemble_refiner")
        with pytest.raises(RequestError, match=r"high_noise_frac 0\.0 .*; raise it, or take base_image_refiner"):
            call(predictor, **{**fields, "high_noise_frac": 0}, refine="expert_ensemble_refiner")
    finally:
        predictor.close()


def test_a_refiner_that_is_not_here(predictor: FluxCompatiblePredictor) -> None:
    with pytest.raises(RequestError, match='refine "sdxl-refiner" is not usable with tiny-sdxl'):
        call(predictor, refine="expert_ensemble_refiner", num_inference_steps=4)


def test_cancelling_ends_the_work(predictor: FluxCompatiblePredictor) -> None:
    say = Lines()

    async def cancelled() -> None:
        given = FluxCompatibleInput(width=512, height=512, num_inference_steps=50, num_outputs=4)
        task = asyncio.create_task(predictor.run(given, say))
        while not say:
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert call(predictor).seeds == (7,)
    assert int(say[-1].split("|")[2].split("/")[0]) < 100


def test_pictures_are_checked_unless_that_is_switched_off(
    sdxl: SdxlPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GESSO_SAFETY")
    monkeypatch.setenv("GESSO_SAFETY_MODEL", str(tmp_path / "checker"))
    with pytest.raises(GessoError, match="safety"):  # nothing is called safe where there is no checker
        with_engine(sdxl)
    free = with_engine(sdxl, disable_safety_checker=True, num_outputs=2)
    pictures = [Image.frombytes("RGB", (256, 256), each) for each in free]
    write_checker(tmp_path / "checker", pictures[:1], pictures[1:])
    say = Lines()
    checked = with_engine(sdxl, say, num_outputs=2)
    assert checked == free[1:]
    assert "warning: the safety checker rejected 1 of the pictures (seed 7)" in say
    with pytest.raises(RejectedError, match="seed 7"):
        with_engine(sdxl)
    monkeypatch.setenv("GESSO_SAFETY", "reject")
    monkeypatch.setenv("GESSO_SAFETY_REQUIRED", "1")
    with pytest.raises(RejectedError, match="seed 7"):  # the operator's word stands over the caller's
        with_engine(sdxl, disable_safety_checker=True)


def with_engine(sdxl: SdxlPipeline, say: Lines | None = None, **values: Any) -> list[bytes]:
    """Pictures of a call to a predictor with an engine of its own, which reads its settings once."""
    predictor = FluxCompatiblePredictor(engine=Engine(device="cpu", load=lambda name, device, dtype: sdxl))
    try:
        return pixels(call(predictor, say, negative_prompt="", **values))
    finally:
        predictor.close()
