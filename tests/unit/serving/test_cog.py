"""The predictor under Cog's own server, over HTTP, asked plainly and by the official `replicate` client.

That client speaks to the cloud; what the cloud puts before Cog's server is `tests/replicate_front.py`.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from gesso.engine.budget import weights_bytes
from gesso.serving.openapi import document
from tests.adapter_server import Page, Site, served
from tests.cog_server import cog_server
from tests.replicate_front import VERSION, replicate_front
from tests.tiny_sdxl import tiny_pipeline, write_sdxl_lora, write_tiny_refiner, write_tiny_sdxl
from tests.unit.serving.test_predictor import data_uri, picture

pytest.importorskip("cog", reason="needs pip install 'gesso[cog]'")
replicate = pytest.importorskip("replicate", reason="needs pip install replicate, as gesso[dev] has it")

pytestmark = pytest.mark.slow
SMALL = {"prompt": "a red star", "width": 256, "height": 256, "num_inference_steps": 2, "output_format": "png"}
SMALL |= {"seed": 7, "negative_prompt": ""}
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Server:
    """One that runs."""

    address: str
    folder: Path

    def post(self, **values: Any) -> httpx2.Response:
        body = {"input": {**SMALL, **values}}
        return httpx2.post(f"{self.address}/predictions", json=body, timeout=_PATIENCE)

    def predict(self, **values: Any) -> dict[str, Any]:
        """An answer that succeeded."""
        answer = self.post(**values).json()
        assert answer.get("status") == "succeeded", answer
        return answer

    def problem(self, **values: Any) -> str:
        """The error of one that failed, which is a single line."""
        answer = self.post(**values).json()
        assert answer["status"] == "failed"
        assert "\n" not in answer["error"]
        return answer["error"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models, of which one fits at a time; two calls at once."""
    folder = tmp_path_factory.mktemp("cog")
    models = [tiny_pipeline(), tiny_pipeline(prediction_type="v_prediction")]
    paths = [write_tiny_sdxl(folder / name, model) for name, model in zip(("one", "other"), models, strict=True)]
    write_sdxl_lora(folder / "loras" / "style.safetensors")
    settings = {
        "GESSO_PREDICTOR_MODEL": str(paths[0]),
        "GESSO_PREDICTOR_STANDARD_MODEL": str(paths[1]),
        "GESSO_PREDICTOR_REFINER_MODEL": str(write_tiny_refiner(folder / "refiner")),
        "GESSO_PREDICTOR_LORA_FOLDER": str(folder / "loras"),
        "GESSO_MODEL_BUDGET": str(weights_bytes(models[:1])),
        "GESSO_SAFETY": "off",
        "GESSO_ALLOW_PRIVATE_ADDRESSES": "1",
        "COG_MAX_CONCURRENCY": "2",
    }
    with cog_server(folder, settings) as address:
        yield Server(address, folder)


def test_the_document_is_served(server: Server) -> None:
    assert httpx2.get(f"{server.address}/openapi.json").json()["components"] == document()["components"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    """The official client, for which the cloud's door stands before Cog's server."""
    with replicate_front(server.address) as address:
        client = replicate.Client(api_token="none", base_url=address)
        client.poll_interval = 0.1
        yield client
        client._client.close()


@pytest.mark.parametrize("strategy", ["base64", "url"])
def test_the_official_client_runs_a_model(client: Any, tmp_path: Path, strategy: str) -> None:
    (tmp_path / "start.png").write_bytes(picture(64, 64))
    values = {**SMALL, "image": tmp_path / "start.png", "num_outputs": 2}
    files = client.run("gesso/sdxl", input=values, file_encoding_strategy=strategy)
    assert [Image.open(io.BytesIO(file.read())).size for file in files] == [(256, 256)] * 2


def test_the_official_client_runs_a_version_without_waiting(server: Server, client: Any) -> None:
    files = client.run(f"gesso/sdxl:{VERSION}", input=SMALL, wait=False)
    assert pixels([file.url for file in files]) == pixels(server.predict()["output"])


def test_the_official_client_follows_and_cancels(client: Any) -> None:
    prediction = client.predictions.create(version=VERSION, input={**SMALL, "num_outputs": 2, "num_inference_steps": 4})
    assert prediction.status in ("starting", "processing")
    prediction.wait()
    assert (prediction.status, len(prediction.output)) == ("succeeded", 2)
    assert (prediction.progress.percentage, prediction.progress.current, prediction.progress.total) == (1.0, 8, 8)
    assert prediction.metrics["seeds"] == [7, 8]
    assert "seed: 7, 8" in prediction.logs
    large = {**SMALL, "width": 1024, "height": 1024, "num_inference_steps": 50, "num_outputs": 4}
    prediction = client.predictions.create(version=VERSION, input=large)
    end = time.monotonic() + _PATIENCE
    while not prediction.progress and time.monotonic() < end:
        time.sleep(0.1)
        prediction.reload()
    assert prediction.status == "processing", prediction.error
    prediction.cancel()
    prediction.wait()
    assert (prediction.status, prediction.output) == ("canceled", None)


def test_the_official_client_is_told_what_is_wrong(client: Any) -> None:
    from replicate.exceptions import ModelError, ReplicateError

    with pytest.raises(ModelError, match='prompt "" is not text of 1 to 2000 characters') as caught:
        client.run("gesso/sdxl", input={**SMALL, "prompt": ""})
    assert "\n" not in str(caught.value)
    with pytest.raises(ReplicateError, match="num_outputs"):
        client.run("gesso/sdxl", input={**SMALL, "num_outputs": 9})


def test_a_refiner_finishes_what_the_standard_model_began(server: Server) -> None:
    fields = {"use_standard_sdxl": True, "num_inference_steps": 4}
    plain = server.predict(**fields)["output"]
    for way in ("expert_ensemble_refiner", "base_image_refiner"):
        assert server.predict(**fields, refine=way)["output"] != plain
    words = server.problem(**fields, refine="base_image_refiner", refine_steps=3)
    assert words.endswith("refine_steps 3 is not at least 4 with base_image_refiner; nearest: 4")


def test_null_and_unknown_fields_are_taken(server: Server) -> None:
    empty = dict.fromkeys(["image", "mask", "guidance", "cfg_scale", "refine_steps", "loras", "hf_api_token"])
    answer = server.predict(**empty, seed=None, no_such_field=1, output_format="jpg")
    assert answer["output"][0].startswith("data:image/jpeg;base64,")
    assert len(answer["metrics"]["seeds"]) == 1
    assert "no_such_field" in (server.folder / "log").read_text()  # where Cog tells of what it drops


@pytest.mark.parametrize("values", [{"num_outputs": 9}, {"scheduler": "PLMS"}, {"seed": "x"}, {"guidance": 0.5}])
def test_values_out_of_bounds_are_refused_at_the_door(server: Server, values: dict[str, Any]) -> None:
    answer = server.post(**values)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "input", *values]


def test_other_bad_input_is_one_line(server: Server) -> None:
    assert server.problem(prompt="").endswith('prompt "" is not text of 1 to 2000 characters')
    assert "/etc/passwd" in server.problem(image="/etc/passwd")
    assert "169.254.169.254" in server.problem(image="http://169.254.169.254/latest")
    assert "mask" in server.problem(mask=data_uri(picture(64, 64)))
    assert server.predict()["metrics"]["seeds"] == [7]


def test_a_lora_from_the_folder_and_from_an_address(server: Server) -> None:
    plain, local = server.predict()["output"], server.predict(lora_weights="style.safetensors")["output"]
    assert local != plain
    content = (server.folder / "loras" / "style.safetensors").read_bytes()
    with served(Site(pages={"/style.safetensors": Page(content)})) as site:
        fetched = server.predict(
            lora_weights=f"{site.address}/style.safetensors", hf_api_token="hf_never", civitai_api_token="civitai_never"
        )
        assert "never" not in str([each.headers for each in site.asked])
    assert pixels(fetched["output"]) == pixels(local)
    assert pixels(server.predict()["output"]) == pixels(plain)
    log = (server.folder / "log").read_text()
    assert "hf_never" not in log
    assert "civitai_never" not in log


def test_models_are_switched_where_one_fits(server: Server) -> None:
    first, other, again = (
        pixels(server.predict(use_standard_sdxl=switch)["output"]) for switch in (False, True, False)
    )
    assert first == again != other


def test_cancelling_in_the_middle(server: Server) -> None:
    values = {**SMALL, "width": 1024, "height": 1024, "num_inference_steps": 50, "num_outputs": 4}
    with Webhook() as webhook:
        began = httpx2.put(
            f"{server.address}/predictions/long",
            json={"id": "long", "input": values, "webhook": webhook.address, "webhook_events_filter": ["completed"]},
            headers={"Prefer": "respond-async"},
            timeout=_PATIENCE,
        )
        assert (began.status_code, began.json()["status"]) == (202, "starting")
        time.sleep(1)
        assert httpx2.post(f"{server.address}/predictions/long/cancel", timeout=_PATIENCE).status_code == 200
        told = webhook.wait()
    assert (told["id"], told["status"]) == ("long", "canceled")
    assert server.predict()["metrics"]["seeds"] == [7]


def test_two_at_once(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda seed: server.predict(seed=seed), (7, 8)))
    assert [answer["metrics"]["seeds"] for answer in answers] == [[7], [8]]
    assert [f"seed: {seed}" in answer["logs"] for seed, answer in zip((7, 8), answers, strict=True)] == [True, True]


def pixels(output: list[str]) -> list[bytes]:
    import base64

    contents = [base64.b64decode(uri.partition(",")[2]) for uri in output]
    return [Image.open(io.BytesIO(content)).convert("RGB").tobytes() for content in contents]


class Webhook:
    """Takes one POST."""

    def __init__(self) -> None:
        self._told: list[dict[str, Any]] = []
        self._came = threading.Event()
        told, came = self._told, self._came

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
                came.set()

            def log_message(self, format: str, *args: object) -> None:
                """Keeps quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}/told"

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self) -> dict[str, Any]:
        assert self._came.wait(_PATIENCE)
        return self._told[0]
