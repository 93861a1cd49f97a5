"""Fetching adapters from Hugging Face, CivitAI, Replicate and a hostile host, and keeping them, by real sockets."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gesso.adapters import sources_record, sources_sites
from gesso.adapters.sources import parse
from gesso.adapters.store import AdapterStore, Fetched, Wishes
from gesso.errors import CancelledError, FileError, GessoError, MissingError, RequestError, RunError
from tests.adapter_server import Page, Site, civitai, lora, served, tar
from tests.hub_server import COMMIT, Hub, wait_until
from tests.hub_server import served as served_hub
from tests.unit.cli.running import spawn

CONTENT = lora(rank=16, width=1024, layers=4)  # about half a megabyte
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = lora(value=0.25)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f"{prefix}{site}_TOKEN" for prefix in ("", "GESSO_") for site in ("HF", "CIVITAI", "REPLICATE")]
    proxies = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    for name in ("GESSO_OFFLINE", "HF_HUB_OFFLINE", "GESSO_LARGEST_ADAPTER", *proxies, *tokens):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GESSO_ALLOW_PRIVATE_ADDRESSES", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(sources_sites, "PAUSE", 0.01)
    monkeypatch.setattr(sources_record, "SEGMENT", 100_000)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with served(Site({"/a.safetensors": Page(CONTENT)})) as serving:
        monkeypatch.setenv("GESSO_CIVITAI_ENDPOINT", serving.address)
        monkeypatch.setattr(sources_sites, "REPLICATE", serving.address)
        yield serving


def have(text: str, **wishes: object) -> Fetched:
    return AdapterStore().ensure(parse(text), Wishes(**wishes))  # type: ignore[arg-type]


def refusal(kind: type[GessoError], text: str, **wishes: object) -> str:
    """The one line of an error of exactly this kind, after which nothing half-done is left."""
    with pytest.raises(kind) as caught:
        have(text, **wishes)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert AdapterStore().adapters() == []
    return str(caught.value)


def parts(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home/adapters/.unfinished").glob("*"))


# ---- a plain address ------------------------------------------------------------------------------------------------


def test_a_file_comes_in_ranges_and_is_kept(site: Site, tmp_path: Path) -> None:
    store, source = AdapterStore(), parse(f"{site.address}/a.safetensors::0.8")
    found = store.ensure(source)
    assert (found.outcome, found.received) == ("fetched", len(CONTENT))
    assert found.adapter.path.read_bytes() == CONTENT
    assert found.adapter.path == tmp_path / f"home/adapters/files/{DIGEST}.safetensors"
    assert len({each.headers.get("Range") for each in site.asked}) == 2 + len(CONTENT) // 100_000
    before = len(site.asked)
    assert store.ensure(source).outcome == "kept"
    assert len(site.asked) == before  # no host is asked for what is here
    assert parts(tmp_path) == []
    counted = store.counters()
    assert (counted.kept, counted.fetched, counted.failed, counted.received_bytes) == (1, 1, 0, len(CONTENT))


def test_a_source_that_changed_is_noticed_when_asked(site: Site) -> None:
    have(f"{site.address}/a.safetensors")
    assert have(f"{site.address}/a.safetensors", update=True).outcome == "kept"  # its host says that it is the same
    site.pages["/a.safetensors"] = Page(OTHER, mark='"two"')
    assert have(f"{site.address}/a.safetensors").adapter.sha256 == DIGEST
    found = have(f"{site.address}/a.safetensors", update=True)
    assert (found.outcome, found.adapter.path.read_bytes()) == ("updated", OTHER)
    assert [each.origins != () for each in AdapterStore().adapters()] == [True, False]


def test_an_altered_file_is_fetched_again(site: Site) -> None:
    path = have(f"{site.address}/a.safetensors").adapter.path
    path.write_bytes(CONTENT[:-4] + b"1234")
    os.utime(path, (0, 0))
    assert have(f"{site.address}/a.safetensors").outcome == "fetched"
    assert path.read_bytes() == CONTENT


def test_connections_that_are_cut_go_on_where_they_were(site: Site) -> None:
    site.pages["/a.safetensors"].cuts = [70_000, 80_000, 0, 66_000]
    assert have(f"{site.address}/a.safetensors").adapter.path.read_bytes() == CONTENT
    assert site.sent("/a.safetensors") < len(CONTENT) + 4 * 20_000


def test_a_host_that_stays_away_and_the_next_run_goes_on(site: Site, tmp_path: Path) -> None:
    page = site.pages["/a.safetensors"]
    page.cuts = [100_000, 100_000] + [0] * 40
    assert "goes on where it stopped" in refusal(RunError, f"{site.address}/a.safetensors")
    assert parts(tmp_path)
    page.cuts = []
    found = have(f"{site.address}/a.safetensors")
    assert found.adapter.path.read_bytes() == CONTENT
    assert found.received <= len(CONTENT) - 190_000
    assert parts(tmp_path) == []


def test_what_was_begun_is_not_continued_with_another_file(site: Site) -> None:
    page = site.pages["/a.safetensors"]
    page.cuts = [100_000, 100_000] + [0] * 40
    refusal(RunError, f"{site.address}/a.safetensors")
    content = CONTENT[:-4] + b"\0\0\x80\x3e"
    site.pages["/a.safetensors"] = Page(content, mark='"two"')
    assert have(f"{site.address}/a.safetensors").adapter.path.read_bytes() == content


def test_a_host_that_asks_for_patience_gets_it(site: Site) -> None:
    page = site.pages["/a.safetensors"]
    page.statuses, page.retry_after = [429, 503], "1"
    began = time.monotonic()
    assert have(f"{site.address}/a.safetensors").outcome == "fetched"
    assert time.monotonic() - began >= 2


def test_a_host_without_ranges(site: Site) -> None:
    site.pages["/a.safetensors"] = Page(CONTENT, ranges=False, cuts=[1, 200_000], mark="")
    assert have(f"{site.address}/a.safetensors").adapter.path.read_bytes() == CONTENT
    site.pages["/b.safetensors"] = Page(OTHER, ranges=False, says_length=False)
    assert have(f"{site.address}/b.safetensors").adapter.path.read_bytes() == OTHER


def test_a_signed_address_that_grows_old(site: Site) -> None:
    with served(Site({"/x": Page(CONTENT)})) as storage:
        site.pages["/r"] = Page(redirect=f"{storage.address}/x")
        assert have(f"{site.address}/r").adapter.path.read_bytes() == CONTENT
        assert len([each for each in site.asked if each.path == "/r"]) == 1  # one redirect serves all ranges
        AdapterStore().remove(AdapterStore().find(DIGEST[:9]))
        site.asked.clear()
        site.pages["/r"].redirect = f"{storage.address}/y?signature=COUNT"
        storage.pages["/y"] = Page(CONTENT, once=True)
        assert have(f"{site.address}/r").adapter.path.read_bytes() == CONTENT
        assert len([each for each in site.asked if each.path == "/r"]) > 1


# ---- a hostile host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (Page(b"<!DOCTYPE html><title>Log in</title>", kind="text/html; charset=utf-8"), "web page"),
        (Page(b"\n <html>" + b" " * 600, kind="application/octet-stream"), "web page"),
        (Page(b"version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git-lfs"),
        (Page(b"\x80\x02ctorch" + b"x" * 600), "pickle"),
        (Page(b"PK\x03\x04" + b"x" * 600), "pickle"),
        (Page(bytes(5000)), "neither safetensors"),
        (Page(b"short"), "truncated"),
        (Page(CONTENT[:-100]), "truncated"),
        (Page(CONTENT + b"more"), "altered"),
        (Page(b"", length=20_000_000_000), "more than the limit"),
        (Page(b"", length=20_000_000_000, ranges=False), "more than the limit"),
        (Page(CONTENT[:100], endless=True, ranges=False), "more than the limit"),
        (Page(CONTENT, length=len(CONTENT) + 1000), "did not come"),
        (Page(CONTENT, length=len(CONTENT) + 1000, ranges=False), "did not come"),
        (Page(CONTENT, encoding="gzip"), "packs"),
        (Page(statuses=[404]), "not there"),
        (Page(statuses=[403]), "refused (HTTP 403)"),
        (Page(statuses=[500] * 9), "HTTP 500"),
        (Page(redirect="http://169.254.169.254/latest"), "redirect leads to"),
    ],
)
def test_what_a_host_may_do_is_one_line(site: Site, tmp_path: Path, page: Page, said: str) -> None:
    site.pages["/x"] = page
    assert said in refusal(RunError, f"{site.address}/x?token=secret", limit=2_000_000)
    assert all("safetensors" not in path.name for path in parts(tmp_path))


def test_a_model_is_no_adapter(site: Site) -> None:
    import numpy as np
    from safetensors.numpy import save

    site.pages["/x"] = Page(save({"model.weight": np.zeros(4, np.float32)}))
    assert "holds no adapter" in refusal(RunError, f"{site.address}/x")


def test_private_addresses_are_refused_unless_allowed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GESSO_ALLOW_PRIVATE_ADDRESSES")
    assert "allow_private_addresses" in refusal(RequestError, f"{site.address}/a.safetensors")
    monkeypatch.setenv("GESSO_OFFLINE", "1")
    assert "unset GESSO_OFFLINE" in refusal(RequestError, f"{site.address}/a.safetensors")


def test_a_full_disk_is_seen_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gesso.adapters.sources_download.free_bytes", lambda folder: 300_000)
    assert "0.3 MB free" in refusal(RunError, f"{site.address}/a.safetensors")
    assert site.sent("/a.safetensors") <= 1


def test_cancelling_is_quick_and_keeps_what_came(site: Site, tmp_path: Path) -> None:
    page = site.pages["/a.safetensors"]
    page.pause = 0.05
    cancelled = threading.Event()
    threading.Timer(0.6, cancelled.set).start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        AdapterStore().ensure(parse(f"{site.address}/a.safetensors"), cancelled=cancelled)
    assert time.monotonic() - began < 5
    assert AdapterStore().adapters() == []
    page.pause = 0.0
    assert 0 < have(f"{site.address}/a.safetensors").received < len(CONTENT)
    site.silent = True
    cancelled.clear()
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(CancelledError):
        AdapterStore().ensure(parse(f"{site.address}/other"), cancelled=cancelled)
    site.silent = False


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


# ---- files of this machine, the store -------------------------------------------------------------------------------


def test_files_of_this_machine_are_used_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(OTHER)
    found = have(f"{path}::0.5")
    assert (found.outcome, found.adapter.path) == ("local", path)
    assert AdapterStore().adapters() == []
    path.write_bytes(b"<html>")
    assert "web page" in refusal(FileError, str(path))
    assert "no such file" in refusal(FileError, str(tmp_path / "none.safetensors"))


def test_two_at_once_fetch_once(site: Site) -> None:
    site.pages["/a.safetensors"].pause = 0.01
    found: list[Fetched] = []
    threads = [threading.Thread(target=lambda: found.append(have(f"{site.address}/a.safetensors"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.adapter.sha256 for each in found} == {DIGEST}
    assert len(found) == 3
    assert site.sent("/a.safetensors") <= len(CONTENT) + 16  # one probe each


def test_a_killed_process_leaves_nothing_broken_and_another_goes_on(site: Site, tmp_path: Path) -> None:
    site.pages["/a.safetensors"].pause = 0.05
    process = spawn("lora", "pull", f"{site.address}/a.safetensors", folder=tmp_path)
    wait_until(lambda: site.sent("/a.safetensors") > 150_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert AdapterStore().adapters() == []
    site.pages["/a.safetensors"].pause = 0.0
    assert have(f"{site.address}/a.safetensors").adapter.path.read_bytes() == CONTENT


def test_damaged_records_and_lost_files_are_as_if_they_were_not(site: Site, tmp_path: Path) -> None:
    found = have(f"{site.address}/a.safetensors")
    record = next((tmp_path / "home/adapters/sources").iterdir())
    for damage in ("", "[]", '{"source": 1}', "[" * 5000):
        record.write_text(damage)
        assert [each.sha256 for each in AdapterStore().adapters()] == [DIGEST]
        assert have(f"{site.address}/a.safetensors").adapter.sha256 == DIGEST
    found.adapter.path.unlink()
    assert AdapterStore().adapters() == []
    assert have(f"{site.address}/a.safetensors").outcome == "fetched"


def test_a_file_here_that_reads_like_a_repository_is_pointed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs/mine/export/adapter.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    store, name = AdapterStore(), "runs/mine/export/adapter.safetensors"
    for source in (name, parse(name)):
        with pytest.raises(RequestError, match=r"write \./runs/mine/export/adapter\.safetensors for the file here"):
            store.find(source)
    with pytest.raises(RequestError, match="gesso lora list shows 0"):
        store.find("x" * 5000)


def test_finding_and_removing(site: Site) -> None:
    store, source = AdapterStore(), parse(f"{site.address}/a.safetensors")
    store.ensure(source)
    assert store.find(source) == store.find(DIGEST[:8]) == store.adapters()[0]
    with pytest.raises(RequestError, match="gesso lora list shows 1"):
        store.find("000000")
    assert store.remove(store.find(source)) == len(CONTENT)
    assert store.adapters() == []
    with pytest.raises(RequestError):
        store.find(source)
