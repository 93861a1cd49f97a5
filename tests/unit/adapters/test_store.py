"""Fetching adapters from plain addresses and a hostile host, and keeping them, by real sockets."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from gesso.adapters.sources import parse
from gesso.adapters.store import AdapterStore, Fetched
from gesso.errors import CancelledError, FileError, RequestError, RunError
from tests.adapter_server import Page, Site, served
from tests.hub_server import wait_until
from tests.unit.adapters.fetching import CONTENT, DIGEST, OTHER, have, parts, refusal
from tests.unit.cli.running import spawn

pytestmark = pytest.mark.usefixtures("own_place")


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
