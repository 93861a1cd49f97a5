"""Fetching models with the hubs' real clients from hubs on loopback that cut, lie, refuse and are slow."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import pytest

from gesso.errors import FileError, MissingError, RequestError, RunError
from gesso.weights import catalogue, hub, manifest
from gesso.weights.hub_clients import HubName
from tests.hub_server import COMMIT, Hub, served
from tests.unit.weights.pulling import (
    HUBS,
    LARGE,
    MODEL,
    REPOSITORY,
    SIZE,
    Silent,
    expected,
    files,
    folder,
    grown,
    pull,
    refusal,
    repository,
)

pytestmark = pytest.mark.usefixtures("own_place")


@pytest.mark.parametrize("origin", HUBS)
def test_a_whole_model(loopback: Hub, origin: HubName) -> None:
    watcher = Silent()
    pulled = pull(origin, watcher=watcher)
    size = sum(map(len, expected().values()))
    assert files() | expected() == files()
    assert set(files()) - set(expected()) == {"manifest.json", hub.REVISIONS}
    assert (pulled.size, pulled.fetched, pulled.files) == (size, size, len(expected()))
    assert pulled.revisions == ((REPOSITORY, COMMIT if origin == "huggingface" else "master"),)
    assert hub.pulled_from(catalogue.find(MODEL)) == dict(pulled.revisions)
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


def test_another_revision_leaves_nothing_of_the_one_before(loopback: Hub) -> None:
    """Else its index of shards would be believed, or its whole file taken for the shards'."""
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    shards = [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    held, whole = loopback.repositories[REPOSITORY], repository()[LARGE]
    pull()
    (folder() / "transformer/mine.txt").write_text("a user's own")
    del held[LARGE]
    held |= {index: b"{}", shards[0]: b"a" * 1000, shards[1]: b"b" * 2000}
    pull()
    assert LARGE not in files()
    assert {index, *shards, "transformer/mine.txt"} <= set(files())
    # One that is cut short is remembered too: what it has placed goes when the old revision is pulled again.
    for name in (index, *shards):
        del held[name]
    held |= {LARGE: whole, "vae/config.json": b'{"a": 2}', "vae/more.json": b"{}"}
    loopback.cuts[LARGE] = [400_000, 0, 0, 0, 0, 0, 0]
    refusal(RunError)
    assert {index, *shards, "vae/more.json"} <= set(files())  # nothing goes before all is here
    loopback.cuts.clear()
    loopback.repositories[REPOSITORY] = repository()
    pull()
    assert set(files()) == {*expected(), "transformer/mine.txt", "manifest.json", hub.REVISIONS}
    assert manifest.findings(folder(), manifest.names(folder()), contents=True).fine


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
@pytest.mark.parametrize("origin", HUBS)
def test_offline_touches_nothing(
    loopback: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, origin: HubName
) -> None:
    monkeypatch.setenv(variable, "1")
    assert "network was not touched" in refusal(RequestError, origin=origin)
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
    assert hub.pulled_from(catalogue.find("infinity-2b")) == dict.fromkeys(loopback.repositories, COMMIT)
    found = {path.relative_to(pulled.folder).as_posix() for path in pulled.folder.rglob("*") if path.is_file()}
    assert found == {
        "manifest.json", hub.REVISIONS, "infinity_2b_reg.pth", "infinity_vae_d32_reg.pth",
        "flan-t5-xl/config.json", "flan-t5-xl/spiece.model", "flan-t5-xl/model.safetensors",
    }  # fmt: skip


def test_where_a_model_is_from_is_a_remark(loopback: Hub) -> None:
    """Folders of before, damaged remarks and pulls that are not done say nothing, and stand in nobody's way."""
    pull()
    entry, remark = catalogue.find(MODEL), folder() / hub.REVISIONS
    assert hub.pulled_from(catalogue.find(str(folder()))) == {REPOSITORY: COMMIT}
    (folder() / manifest.UNFINISHED).mkdir()
    assert hub.pulled_from(entry) == {}
    assert pull().fetched == 0
    for content in ("[", "[]", "3"):
        remark.write_text(content)
        assert hub.pulled_from(entry) == {}
    remark.unlink()
    assert hub.pulled_from(entry) == {}
    assert entry.missing_files() == []
    assert manifest.findings(folder(), manifest.names(folder()), contents=True).fine
    assert hub.pulled_from(catalogue.find("infinity-nano")) == {}


def test_a_model_is_pulled_and_removed_by_its_own_name(loopback: Hub) -> None:
    pull()
    (folder().parents[1] / "models.toml").write_text(f'[models.mine]\npath = "weights/{MODEL}"\n')
    for name in (str(folder()), "mine"):
        assert f"say {MODEL}, which lies there" in refusal(RequestError, name=name)
        with pytest.raises(RequestError, match=f"say {MODEL}"):
            hub.remove(catalogue.find(name))
    assert hub.remove(catalogue.find(MODEL)) > SIZE


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
