"""Fetching adapters from Replicate, CivitAI and Hugging Face, by real sockets."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from gesso.adapters.store import AdapterStore
from gesso.errors import MissingError, RequestError, RunError
from tests.adapter_server import Page, Site, civitai, served, tar
from tests.hub_server import COMMIT, Hub
from tests.hub_server import served as served_hub
from tests.unit.adapters.fetching import CONTENT, DIGEST, OTHER, have, parts, refusal

pytestmark = pytest.mark.usefixtures("own_place")


# ---- archives -------------------------------------------------------------------------------------------------------


def test_replicates_archives(site: Site, tmp_path: Path) -> None:
    inner = {"output/flux/lora.safetensors": OTHER, "output/flux/config.yaml": b"a: 1", "output/captions.txt": b"x"}
    more = {"b/lora.safetensors": CONTENT}
    site.pages["/owner/model/_weights"] = Page(redirect="/delivery/trained.tar")
    site.pages["/delivery/trained.tar"] = Page(tar(inner))
    found = have("replicate:owner/model")
    assert found.adapter.path.read_bytes() == OTHER
    assert found.adapter.origins[0].facts["file"] == "lora.safetensors"
    site.pages["/owner/model/versions/abc1/_weights"] = Page(gzip.compress(tar(inner | more)))
    AdapterStore().remove(found.adapter)
    assert "several: lora.safetensors, lora.safetensors; name one" in refusal(RunError, "replicate:owner/model@abc1")
    assert have("replicate:owner/model@abc1/b/lora.safetensors").adapter.sha256 == DIGEST
    assert parts(tmp_path) == []


def test_archives_that_mean_harm(site: Site, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(3_000_000))
    large = bytearray(tar({"a.safetensors": b""}))
    large[124:136] = b"77777777777\0"
    header = bytearray(tar({"x" * 20: b""}))
    header[156:157], header[124:136] = b"x", b"00200000000\0"
    nested = tar({"a" * 150: b""})[:1024] * 1900
    for archive, said in (
        (tar({}, {"a.safetensors": "/etc/passwd"}), "has no .safetensors"),
        (bomb, "unpacks to more"),
        (bytes(large), "archive"),
        (bytes(header), "archive"),
        (nested, "archive"),
        (tar({"a.safetensors": b"\x80\x02ctorch"}), "pickle"),
        (gzip.compress(tar({"a.safetensors": OTHER}))[:-30], "damaged archive"),
    ):
        site.pages["/x.tar"] = Page(archive)
        assert said in refusal(RunError, f"{site.address}/x.tar", limit=2_000_000)
    site.pages["/x.tar"] = Page(tar({"../../../evil.safetensors": OTHER}))
    have(f"{site.address}/x.tar")
    assert [path.name for path in tmp_path.rglob("*evil*")] == []
    assert parts(tmp_path) == []


# ---- CivitAI --------------------------------------------------------------------------------------------------------


def test_civitai_by_model_and_version(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    civitai(site, CONTENT, DIGEST, token="secret")
    message = refusal(RunError, "civitai.com/models/12")
    assert "civitai_token" in message
    monkeypatch.setenv("GESSO_CIVITAI_TOKEN", "secret")
    with served(Site({"/signed": Page(CONTENT)})) as storage:
        site.pages["/api/download/models/34"] = Page(redirect=f"{storage.address}/signed?sig=1", token="secret")
        found = have("https://civitai.com/models/12/style")
        assert not any("Authorization" in each.headers for each in storage.asked)
    origin = found.adapter.origins[0]
    assert (found.adapter.sha256, origin.revision, origin.source) == (DIGEST, "34", "civitai:12")
    assert origin.facts["file"] == "Style One.safetensors"
    assert origin.facts["trained words"] == "stylish, one"
    assert have("civitai:12", family="sdxl").adapter.origins[0].revision == "33"
    assert have("urn:air:flux1:lora:civitai:12@34").outcome == "kept"  # the same bytes come once
    assert len(AdapterStore().adapters()) == 1


def test_civitais_refusals(site: Site) -> None:
    page = civitai(site, CONTENT, "0" * 64)
    assert "other bytes than its site states" in refusal(RunError, "civitai:12")
    page.kind, page.content = "text/html", b"<html>log in"
    assert "civitai_token" in refusal(RunError, "civitai:12")
    assert "no model 99" in refusal(RunError, "civitai:99")
    assert "calls it Checkpoint" in refusal(RequestError, "civitai:13")
    assert "no .safetensors file, only PickleTensor" in refusal(RunError, "civitai:14")
    assert "it has none" in refusal(RunError, "civitai:15")
    assert "34 for Flux.1 D" in refusal(RunError, "civitai:12", family="qwen-image")
    assert "a version of model 12" in refusal(RequestError, "civitai:5@34")


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {"style.safetensors": CONTENT, "README.md": b"no"}
    with served_hub(Hub({"owner/style": files, "owner/two": {"a.safetensors": OTHER, "b.safetensors": OTHER}})) as hub:
        hub.repositories["owner/pickle"] = {"adapter_model.bin": b"x"}
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


def test_hugging_face(loopback: Hub, tmp_path: Path) -> None:
    found = have("owner/style")
    assert (found.adapter.sha256, found.adapter.origins[0].revision) == (DIGEST, COMMIT)
    assert have("owner/style@main/style.safetensors").outcome == "kept"
    assert have("owner/style", update=True).received == 0
    AdapterStore().remove(found.adapter)
    assert "a.safetensors, b.safetensors" in refusal(RequestError, "owner/two")
    assert "holds no c.safetensors; it has a.safetensors, b.safetensors" in refusal(RunError, "owner/two/c.safetensors")
    assert "pickles" in refusal(RunError, "owner/pickle")
    assert "a revision of" in refusal(RequestError, "owner/style@none")
    assert "not to be found" in refusal(RunError, "owner/nothing")
    (tmp_path / "owner/two").mkdir(parents=True)
    (tmp_path / "owner/two/a.safetensors").write_bytes(OTHER)
    assert "hf:owner/two/a.safetensors" in refusal(RequestError, "owner/two/a.safetensors")
    loopback.other_bytes = ("style.safetensors",)
    assert "neither safetensors" in refusal(RunError, "owner/style")


def test_gated_repositories_and_whose_token_it_is(loopback: Hub) -> None:
    loopback.gated, loopback.token, loopback.open_listing = True, "hf_secret", True
    assert "hf_token" in refusal(RunError, "owner/style")
    loopback.open_listing = False
    assert refusal(MissingError, "owner/style").endswith("gesso lora pull owner/style")
    loopback.open_listing = True
    with served_hub(Hub({"owner/style": {"style.safetensors": CONTENT}})) as storage:
        loopback.bytes_at = ""
        found = have("owner/style", tokens={"huggingface": "hf_secret"})
        assert found.adapter.origins[0].private
        assert not any("hf_secret" in str(each.headers) for each in storage.asked)
    assert have("owner/style", tokens={"huggingface": "hf_secret"}).received == 0
    for wishes in ({}, {"tokens": {"huggingface": "hf_wrong"}}):
        with pytest.raises(RunError, match="hf_token") as caught:  # what came by one person's token is not another's
            have("owner/style", **wishes)
        assert "hf_wrong" not in str(caught.value)
