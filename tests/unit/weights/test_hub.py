"""Fetching models with the hubs' real clients from hubs on loopback that cut, lie, refuse and are slow."""

from __future__ import annotations

import json
import logging
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gesso.errors import FileError, GessoError, MissingError, RequestError, RunError
from gesso.weights import catalogue, hub, hub_transfer, manifest
from gesso.weights.hub import Pulled
from gesso.weights.hub_clients import HubName
from tests.hub_server import COMMIT, Hub, served, wait_until
from tests.unit.cli.running import call, spawn

MODEL = "z-image-turbo"
REPOSITORY = "Tongyi-MAI/Z-Image-Turbo"
LARGE = "transformer/diffusion_pytorch_model.safetensors"
SIZE = 600_000
HUBS: tuple[HubName, ...] = ("huggingface", "modelscope")


class Silent:
    """A watcher that keeps what it was told."""

    def __init__(self) -> None:
        self.begun: tuple[int, int] | None = None
        self.moves: list[int] = []
        self.waited = threading.Event()

    def begin(self, total: int, here: int) -> None:
        self.begun = (total, here)

    def move(self, here: int) -> None:
        self.moves.append(here)

    def wait(self) -> None:
        self.waited.set()


def repository() -> dict[str, bytes]:
    """A model in diffusers' layout as small as can be, with files that are not to be fetched."""
    content = random.Random(7)
    files = {f"{part}/config.json": b'{"a": 1}' for part in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return {
        "model_index.json": b'{"_class_name": "ZImagePipeline"}',
        **files,
        LARGE: content.randbytes(SIZE),
        "vae/diffusion_pytorch_model.safetensors": content.randbytes(50_000),
        "tokenizer/merges.txt": b"",
        "README.md": b"no",
        "vae/run.py": b"no",
        "vae/model.bin": b"no",
        "whole.safetensors": b"the same weights once more",
    }


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "GESSO_HF_TOKEN", "GESSO_MODELSCOPE_TOKEN")
    for name in ("GESSO_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", *tokens):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(hub_transfer, "_PAUSE", 0.01)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One server that both clients are pointed at."""
    with served(Hub({REPOSITORY: repository()})) as serving:
        monkeypatch.setenv("HF_ENDPOINT", serving.address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", serving.address)
        yield serving


def pull(
    origin: HubName = "huggingface", revision: str | None = None, watcher: Silent | None = None, name: str = MODEL
) -> Pulled:
    return hub.pull(
        catalogue.find(name), origin=origin, revisions=[revision] if revision else (), watcher=watcher or Silent()
    )


def folder() -> Path:
    return catalogue.find(MODEL).folder


def files() -> dict[str, bytes]:
    """What lies in the model's folder under its own names."""
    found = {path.relative_to(folder()).as_posix(): path for path in folder().rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(manifest.UNFINISHED)}


def expected() -> dict[str, bytes]:
    unwanted = ("README.md", "vae/run.py", "vae/model.bin", "whole.safetensors")
    return {name: content for name, content in repository().items() if name not in unwanted}


def refusal(kind: type[GessoError], **options: object) -> str:
    """The one line of an error of exactly this kind."""
    with pytest.raises(kind) as caught:
        pull(**options)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("origin", HUBS)
def test_a_whole_model(loopback: Hub, origin: HubName) -> None:
    watcher = Silent()
    pulled = pull(origin, watcher=watcher)
    size = sum(map(len, expected().values()))
    assert files() | expected() == files()
    assert set(files()) - set(expected()) == {"manifest.json"}
    assert (pulled.size, pulled.fetched, pulled.files) == (size, size, len(expected()))
    assert pulled.revisions == ((REPOSITORY, COMMIT if origin == "huggingface" else "master"),)
    assert (watcher.begun, watcher.moves[-1]) == ((size, 0), size)
    assert catalogue.find(MODEL).missing_files() == []
    assert manifest.findings(folder(), manifest.names(folder()), contents=True).fine
    assert not (folder() / manifest.UNFINISHED).exists()
    assert logging.getLogger("huggingface_hub").level < logging.CRITICAL  # its warnings are back
    assert pull(origin).fetched == 0  # nothing is fetched twice


@pytest.mark.parametrize("origin", HUBS)
def test_cut_connections_go_on_where_they_were_cut(loopback: Hub, origin: HubName) -> None:
    loopback.cuts[LARGE] = [200_000, 0, 150_000]
    assert pull(origin).fetched <= sum(map(len, expected().values()))
    assert files()[LARGE] == expected()[LARGE]
    assert loopback.sent(LARGE) < SIZE + 3 * 65_536


@pytest.mark.parametrize("origin", HUBS)
def test_a_hub_that_stays_away_is_one_line_and_the_next_run_goes_on(loopback: Hub, origin: HubName) -> None:
    loopback.cuts[LARGE] = [400_000, 0, 0, 0, 0, 0, 0]
    assert "goes on where it stopped" in refusal(RunError, origin=origin)
    assert LARGE not in files()
    assert "manifest.json" not in files()
    (folder() / "transformer").mkdir(exist_ok=True)
    assert "cut short" in " ".join(catalogue.find(MODEL).missing_files())  # never taken for a whole model
    loopback.cuts.clear()
    before, watcher = loopback.sent(LARGE), Silent()
    pull(origin, watcher=watcher)
    assert loopback.sent(LARGE) - before <= 200_000 + 65_536
    assert watcher.begun is not None
    assert watcher.begun[1] >= 400_000 - 65_536
    assert files()[LARGE] == expected()[LARGE]


def test_a_hub_that_ignores_ranges(loopback: Hub) -> None:
    loopback.cuts[LARGE], loopback.ignores_ranges = [300_000], True
    watcher = Silent()
    pull(watcher=watcher)
    assert files()[LARGE] == expected()[LARGE]
    assert watcher.moves[-1] == sum(map(len, expected().values()))


@pytest.mark.parametrize("origin", HUBS)
@pytest.mark.parametrize("name", [LARGE, "vae/config.json"])
def test_other_bytes_are_refused_by_name_and_removed(loopback: Hub, origin: HubName, name: str) -> None:
    loopback.other_bytes = (name,)
    message = refusal(RunError, origin=origin)
    assert name in message
    assert "other bytes" in message
    assert name not in files()
    loopback.other_bytes = ()
    pull(origin)
    assert files()[name] == expected()[name]


def test_a_damaged_file_is_mended(loopback: Hub) -> None:
    pull()
    (folder() / LARGE).write_bytes(bytes(SIZE))
    (folder() / "vae/config.json").unlink()
    assert pull().fetched == SIZE + len(expected()["vae/config.json"])
    assert files()[LARGE] == expected()[LARGE]


def test_a_full_disk_is_seen_before_a_file_is_asked_for(loopback: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "free_bytes", lambda folder: 300_000)
    message = refusal(RunError)
    assert "needs 0.7 MB more" in message
    assert "0.3 MB free" in message
    assert not any("resolve" in asked.path for asked in loopback.asked)
    assert not folder().exists()


def test_a_disk_that_takes_no_more_while_a_file_comes(loopback: Hub) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        assert "make room" in refusal(RunError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert grown() == 300_000
    assert pull().fetched <= sum(map(len, expected().values())) - 300_000
    assert files()[LARGE] == expected()[LARGE]


def test_gated_licences_are_explained_and_tokens_stay_at_their_hub(
    loopback: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.gated, loopback.token = True, "hf_secret"
    for origin, setting in (("huggingface", "hf_token"), ("modelscope", "modelscope_token")):
        message = refusal(MissingError, origin=origin)
        assert setting in message
        assert REPOSITORY in message
        assert loopback.address in message
        assert message.endswith(f"gesso models pull {MODEL}")
    loopback.open_listing = True
    assert "accept its licence" in refusal(MissingError)
    monkeypatch.setenv("GESSO_HF_TOKEN", "hf_wrong")
    assert "hf_wrong" not in refusal(MissingError)
    monkeypatch.setenv("GESSO_HF_TOKEN", "hf_secret")
    with served(Hub({REPOSITORY: repository()})) as elsewhere:
        loopback.bytes_at = elsewhere.address
        pull()
        assert elsewhere.asked
        assert not any("hf_secret" in str(asked.headers) for asked in elsewhere.asked)
    assert files()[LARGE] == expected()[LARGE]


def test_a_modelscope_token_stays_at_its_hub(loopback: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    loopback.gated, loopback.token = True, "ms-secret"
    monkeypatch.setenv("GESSO_MODELSCOPE_TOKEN", "ms-secret")
    with served(Hub({REPOSITORY: repository()})) as elsewhere:
        loopback.bytes_at = elsewhere.address.replace("127.0.0.1", "localhost")
        pull("modelscope")
        assert elsewhere.asked
        assert not any("ms-secret" in str(asked.headers) for asked in elsewhere.asked)
    assert files()[LARGE] == expected()[LARGE]


def test_what_is_not_there(loopback: Hub) -> None:
    assert "revision" in refusal(RequestError, revision="none")
    assert "revision none" in refusal(RunError, origin="modelscope", revision="none")
    assert "use --from huggingface" in refusal(RequestError, origin="modelscope", name="infinity-2b")
    loopback.repositories = {"other/one": {}}
    for origin in HUBS:
        assert "not to be found" in refusal(RunError, origin=origin)
    loopback.repositories = {REPOSITORY: {"model_index.json": b"{}"}}
    assert "holds no transformer" in refusal(RunError)
    assert "ships with gesso" in refusal(RequestError, name="infinity-nano")
    assert not folder().exists()


def test_trouble_of_the_hub(loopback: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    loopback.status["Z-Image-Turbo"] = [503]
    assert "HTTP 503" in refusal(RunError)
    loopback.status["model_index.json"] = [500, 429]  # passes
    pull()
    loopback.status["vae/config.json"] = [500] * 20
    (folder() / "vae/config.json").unlink()
    assert "HTTP 500" in refusal(RunError)
    with served(Hub({})) as gone:
        pass
    for variable, origin in (("HF_ENDPOINT", "huggingface"), ("MODELSCOPE_ENDPOINT", "modelscope")):
        monkeypatch.setenv(variable, gone.address)
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
        message = refusal(RunError, origin=origin)
        assert "cannot be reached" in message or "was cut off" in message
        assert variable in message


def test_a_hub_that_says_nothing(loopback: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gesso.weights.hub_clients._TIMEOUT", 0.3)
    loopback.silent = True
    try:
        assert "did not answer" in refusal(RunError)
    finally:
        loopback.silent = False


@pytest.mark.parametrize("variable", ["GESSO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_touches_nothing(loopback: Hub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert "network was not touched" in refusal(RequestError)
    assert loopback.asked == []
    assert not folder().exists()


@pytest.mark.parametrize("name", ["vae/../../../x.json", "transformer/../../x.safetensors"])
@pytest.mark.parametrize("origin", HUBS)
def test_names_that_lead_out_are_refused(loopback: Hub, tmp_path: Path, name: str, origin: HubName) -> None:
    loopback.repositories[REPOSITORY][name] = b"{}"
    assert "does not lie in it" in refusal(FileError, origin=origin)
    assert not folder().exists()
    assert not list(tmp_path.glob("**/x.*"))


def test_infinity_comes_from_two_repositories(loopback: Hub) -> None:
    weights = {"infinity_2b_reg.pth": b"a" * 1000, "infinity_vae_d32_reg.pth": b"b" * 100, "other.pth": b"c"}
    text = {"config.json": b"{}", "spiece.model": b"s", "model.safetensors": b"t" * 10, "pytorch_model.bin": b"no"}
    loopback.repositories = {"FoundationVision/Infinity": weights, "google/flan-t5-xl": text}
    pulled = pull(name="infinity-2b")
    assert [repository for repository, _ in pulled.revisions] == list(loopback.repositories)
    found = {path.relative_to(pulled.folder).as_posix() for path in pulled.folder.rglob("*") if path.is_file()}
    assert found == {
        "manifest.json", "infinity_2b_reg.pth", "infinity_vae_d32_reg.pth",
        "flan-t5-xl/config.json", "flan-t5-xl/spiece.model", "flan-t5-xl/model.safetensors",
    }  # fmt: skip


def test_a_revision_is_that_of_a_repository(loopback: Hub) -> None:
    """Said of one of several by name; where nothing is said, the catalogue's entry has the word."""
    weights = {"infinity_2b_reg.pth": b"a" * 1000, "infinity_vae_d32_reg.pth": b"b" * 100}
    text = {"config.json": b"{}", "spiece.model": b"s", "model.safetensors": b"t" * 10}
    loopback.repositories = {"FoundationVision/Infinity": weights, "google/flan-t5-xl": text}
    pull(name="infinity-2b", revision=f"google/flan-t5-xl={COMMIT}")
    asked = [one.path for one in loopback.asked if "/revision/" in one.path]
    assert any(f"google/flan-t5-xl/revision/{COMMIT}" in path for path in asked)
    assert not any("Infinity/revision/0" in path for path in asked)
    for said in ("v1", "=v1", "google/flan-t5-xl=", "somebody/else=v1"):
        with pytest.raises(RequestError, match=r"say FoundationVision/Infinity=REVISION or google/flan-t5-xl=REVISION"):
            pull(name="infinity-2b", revision=said)
    with pytest.raises(RequestError, match="revision"):
        pull(name="infinity-2b", revision="google/flan-t5-xl=none")

    home = folder().parents[1]
    loopback.repositories = {"me/tuned": repository()}
    entry = '[models.tuned]\nfamily = "z-image"\nlayout = "diffusers"\n'
    entry += 'sources = [{ repository = "me/tuned", revision = "%s" }]'
    (home / "models.toml").write_text(entry % COMMIT)
    assert pull(name="tuned").revisions == (("me/tuned", COMMIT),)
    (home / "models.toml").write_text(entry % "none")
    with pytest.raises(RequestError, match="revision"):
        pull(name="tuned")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_pull_that_is_ended_is_finished_by_the_next(loopback: Hub, tmp_path: Path, ending: signal.Signals) -> None:
    loopback.pause = 0.1
    process = spawn("models", "pull", MODEL, folder=tmp_path)
    wait_until(lambda: grown() > 200_000)
    before = time.monotonic()
    process.send_signal(ending)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - before < 10
    assert out == ""
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert "what has come is kept" in err
        assert "Traceback" not in err
    assert LARGE not in files()
    kept, loopback.pause = grown(), 0.0
    wait_until(lambda: any(LARGE in asked.path for asked in loopback.asked))  # the hub has seen that nobody listens
    already = loopback.sent(LARGE)
    assert kept > 200_000
    pull()
    assert loopback.sent(LARGE) - already == SIZE - kept
    assert files()[LARGE] == expected()[LARGE]


def grown() -> int:
    """Bytes of the largest file that is being fetched; a small one may be done while it is looked at."""
    sizes = [0]
    for path in folder().glob(f"{manifest.UNFINISHED}/*.part"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def test_two_pulls_at_once(loopback: Hub) -> None:
    loopback.pause = 0.02
    results: list[Pulled] = []
    second = Silent()
    threads = [threading.Thread(target=lambda: results.append(pull()))]
    threads.append(threading.Thread(target=lambda: results.append(pull(watcher=second))))
    threads[0].start()
    wait_until(lambda: grown() > 0)
    threads[1].start()
    wait_until(second.waited.is_set)
    with pytest.raises(RunError, match="is being pulled"):
        hub.remove(catalogue.find(MODEL))
    for thread in threads:
        thread.join()
    assert sorted(pulled.fetched > 0 for pulled in results) == [False, True]
    assert loopback.sent(LARGE) == SIZE
    assert files()[LARGE] == expected()[LARGE]


def test_removing(loopback: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not here"):
        hub.removable(catalogue.find(MODEL))
    pull()
    size = sum(map(len, files().values()))
    assert hub.remove(catalogue.find(MODEL)) == size
    assert not folder().exists()
    with pytest.raises(RequestError, match="ships with gesso"):
        hub.remove(catalogue.find("infinity-nano"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder().symlink_to(outside)
    for refused in (lambda: hub.remove(catalogue.find(MODEL)), pull):
        with pytest.raises(FileError):
            refused()
    assert (outside / "mine").read_text() == "mine"


def test_by_the_command_line(capsys: pytest.CaptureFixture[str], loopback: Hub) -> None:
    outcome = call(capsys, "generate", "a star", "--model", MODEL)
    assert outcome.status == 3
    assert outcome.error.endswith(f"get it with: gesso models pull {MODEL}")
    outcome = call(capsys, "models", "pull", MODEL, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    line = json.loads(outcome.out)
    assert (line["name"], line["from"], line["files"]) == (MODEL, "huggingface", len(expected()))
    again = call(capsys, "models", "pull", MODEL, "--from", "modelscope")
    assert "all whole" in again.out
    assert again.err.splitlines()[-1] == f"{MODEL}: 1 MB"
    assert "all whole" in call(capsys, "models", "verify", MODEL).out
    (folder() / LARGE).write_bytes(bytes(SIZE))
    assert call(capsys, "models", "verify", MODEL).out == f"altered: {LARGE}\n"
    assert "--yes would remove" in call(capsys, "models", "remove", MODEL).error
    assert folder().is_dir()
    assert "0.7 MB freed" in call(capsys, "models", "remove", MODEL, "--yes").out
    assert not folder().exists()
