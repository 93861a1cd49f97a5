"""Fetching adapters from Replicate, CivitAI and Hugging Face, by real sockets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gesso.adapters.sources import parse
from gesso.adapters.store import AdapterStore, warnings_of
from gesso.errors import MissingError, RequestError, RunError
from tests.adapter_server import Page, Site, civitai, lora, served, tar
from tests.hub_server import COMMIT, Hub
from tests.hub_server import served as served_hub
from tests.unit.adapters.fetching import CONTENT, DIGEST, OTHER, have, parts, refusal
from tests.unit.cli.running import call

pytestmark = pytest.mark.usefixtures("own_place")


# ---- archives -------------------------------------------------------------------------------------------------------


def test_replicates_archives(site: Site, tmp_path: Path) -> None:
    inner = {"output/flux/lora.safetensors": OTHER, "output/flux/config.yaml": b"a: 1", "output/captions.txt": b"x"}
    more = {"b/lora.safetensors": CONTENT}
    site.pages["/owner/model/_weights"] = Page(redirect="/delivery/trained.tar")
    site.pages["/delivery/trained.tar"] = Page(tar(inner))
    found = have("replicate:owner/model")
    assert found.adapter.path.read_bytes() == OTHER
    assert found.adapter.origins[0].facts == {"file": "lora.safetensors"}
    assert warnings_of(found.adapter, parse("replicate:owner/model")) == ()
    site.pages["/owner/model/versions/abc1/_weights"] = Page(gzip.compress(tar(inner | more)))
    AdapterStore().remove(found.adapter)
    assert "several: lora.safetensors, lora.safetensors; name one" in refusal(RunError, "replicate:owner/model@abc1")
    assert have("replicate:owner/model@abc1/b/lora.safetensors").adapter.sha256 == DIGEST
    assert parts(tmp_path) == []


def test_trained_words_in_an_archive_are_not_read_and_told_of(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    inner = {"out/lora.safetensors": OTHER, "out/embeddings.pti": b"x" * 600, "special_params.json": b"{"}
    site.pages["/owner/words/_weights"] = Page(tar(inner))
    site.pages["/b.safetensors"] = Page(OTHER)
    found = have("replicate:owner/words").adapter
    words = "trained words (embeddings.pti, special_params.json)"
    assert f"left out      {words}\n" in call(capsys, "lora", "show", "replicate:owner/words").out
    (warning,) = warnings_of(found, parse("replicate:owner/words::0.5"))
    assert warning.startswith(f"replicate:owner/words has {words} that are not read")
    same = have(f"{site.address}/b.safetensors").adapter  # the same file without them
    assert (same.path, len(same.origins)) == (found.path, 2)
    assert warnings_of(same, parse(f"{site.address}/b.safetensors")) == ()


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


PEFT = lora(prefix="base_model.model.")
CONFIGS = [json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}).encode() for alpha in (32, 4)]


def test_pefts_configuration_comes_along_and_is_kept_with_its_weights(
    loopback: Hub, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two configurations of the same weights are two adapters, and neither is that of the weights alone."""
    for name, config in zip(("owner/one", "owner/other"), CONFIGS, strict=True):
        loopback.repositories[name] = {"sub/adapter_model.safetensors": PEFT, "sub/adapter_config.json": config}
    loopback.repositories["owner/other"]["adapter_config.json"] = b"of another folder"
    site.pages["/bare.safetensors"] = Page(PEFT)
    bare = have(f"{site.address}/bare.safetensors").adapter
    first, second = have("owner/one"), have("owner/other")
    assert (first.outcome, first.received) == ("kept", 0)  # the weights were here
    assert len({bare.sha256, first.adapter.sha256, second.adapter.sha256}) == 1
    assert len({bare.name, first.adapter.name, second.adapter.name}) == 3
    monkeypatch.setenv("GESSO_OFFLINE", "1")
    for name, config in zip(("owner/one", "owner/other"), CONFIGS, strict=True):
        adapter = have(name).adapter
        assert adapter.path.with_name("adapter_config.json").read_bytes() == config
        assert adapter.path.read_bytes() == PEFT
        assert adapter.path == AdapterStore().glance(parse(name))
        assert [origin.source for origin in adapter.origins] == [name]
    assert not bare.path.with_name("adapter_config.json").exists()
    store = AdapterStore()
    with pytest.raises(RequestError, match="name one by its digits"):
        store.find(bare.sha256[:12])
    store.remove(store.find(first.adapter.name))
    assert {each.name for each in store.adapters()} == {bare.name, second.adapter.name}
    assert not first.adapter.path.parent.exists()


def test_a_configuration_that_changed_or_is_lost_comes_again(loopback: Hub) -> None:
    files = loopback.repositories["owner/peft"] = {"adapter_model.safetensors": PEFT}
    before = have("owner/peft")  # as it was kept before such files came along
    files["adapter_config.json"] = CONFIGS[0]
    assert have("owner/peft").adapter.config == before.adapter.config == ""
    found = have("owner/peft", update=True)
    assert (found.outcome, found.received) == ("updated", 0)
    assert have("owner/peft", update=True).outcome == "kept"
    beside = found.adapter.path.with_name("adapter_config.json")
    for damage in (lambda: beside.write_bytes(b"{}"), beside.unlink):
        damage()
        again = have("owner/peft")
        assert (again.adapter.path, beside.read_bytes()) == (found.adapter.path, CONFIGS[0])
    files["adapter_config.json"] = CONFIGS[1]
    assert have("owner/peft", update=True).outcome == "updated"
    assert have("owner/peft").adapter.path.with_name("adapter_config.json").read_bytes() == CONFIGS[1]
    store = AdapterStore()
    assert [bool(each.origins) for each in store.adapters()] == [True, False, False]
    for each in store.adapters():  # one of them without a configuration: its digits begin those of the others
        assert store.find(each.name) == each


def test_configurations_that_are_not_kept(loopback: Hub) -> None:
    loopback.repositories["owner/style"]["adapter_config.json"] = CONFIGS[0]
    assert have("owner/style").adapter.config == ""  # its names are not PEFT's
    AdapterStore().remove(AdapterStore().adapters()[0])
    files = loopback.repositories["owner/peft"] = {"a.safetensors": PEFT, "adapter_config.json": b" " * (1 << 21)}
    assert "adapter_config.json has more than 1048576 bytes" in refusal(RunError, "owner/peft")
    files["adapter_config.json"] = b'{"peft_type": "IA3"}'
    assert "adapter_config.json beside it says peft_type" in refusal(RunError, "owner/peft")
    assert AdapterStore().adapters() == []
    files["adapter_config.json"] = CONFIGS[0]
    loopback.status["adapter_config.json"] = [403]
    assert "adapter_config.json is refused (HTTP 403); accept its terms" in refusal(RunError, "owner/peft")


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
