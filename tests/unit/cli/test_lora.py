"""`gesso lora`: from a source to a file and back, one line and the right exit status for everything that goes wrong."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapter_server import Page, Site, civitai, lora, served
from tests.hub_server import wait_until
from tests.unit.cli.running import call, spawn

CONTENT = lora()
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("GESSO_OFFLINE", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "GESSO_CIVITAI_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GESSO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GESSO_ALLOW_PRIVATE_ADDRESSES", "1")
    monkeypatch.setattr("gesso.adapters.sources_sites.PAUSE", 0.01)
    with served(Site({"/a.safetensors": Page(CONTENT)})) as serving:
        monkeypatch.setenv("GESSO_CIVITAI_ENDPOINT", serving.address)
        yield serving


def test_pulled_listed_shown_and_removed(capsys: pytest.CaptureFixture[str], site: Site) -> None:
    civitai(site, CONTENT, DIGEST)
    source = f"{site.address}/a.safetensors"
    pulled = call(capsys, "lora", "pull", source, "civitai:12")
    assert pulled.status == 0
    first, second = pulled.out.splitlines()
    assert first.startswith(f"{source}: fetched, LoRA of rank 2 for flux")
    assert second.startswith("civitai:12: here already, unchanged")
    assert "fetched" not in call(capsys, "lora", "pull", source).out.partition(": ")[2]
    line = call(capsys, "lora", "list").out.splitlines()[1]
    assert line.startswith(DIGEST[:12])
    assert ", and 1 more" in line
    shown = call(capsys, "lora", "show", "civitai:12").out
    assert shown == call(capsys, "lora", "show", DIGEST[:8]).out
    for word in (DIGEST, "stylish", "Flux.1 D", "civitai:12 at 34", source):
        assert word in shown
    assert "--yes would remove" in call(capsys, "lora", "remove", DIGEST[:8]).error
    removed = call(capsys, "lora", "remove", DIGEST[:8], "--yes")
    assert (removed.status, "removed" in removed.out) == (0, True)
    assert len(call(capsys, "lora").out.splitlines()) == 1


def test_for_machines(capsys: pytest.CaptureFixture[str], site: Site, tmp_path: Path) -> None:
    pulled = call(capsys, "lora", "pull", f"{site.address}/a.safetensors?token=secret", "--json")
    line = json.loads(pulled.out)
    assert (pulled.err, line["sha256"], line["outcome"], line["received"]) == ("", DIGEST, "fetched", len(CONTENT))
    for command in (("list",), ("show", DIGEST), ()):
        assert json.loads(call(capsys, "lora", *command, "--json").out)["sha256"] == DIGEST
    kept = [path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not any(b"secret" in content for content in kept)
    removed = json.loads(call(capsys, "lora", "remove", DIGEST, "--yes", "--json").out)
    assert removed["freed"] == len(CONTENT)


def test_every_refusal_is_one_line_with_its_status(
    capsys: pytest.CaptureFixture[str], site: Site, tmp_path: Path
) -> None:
    site.pages["/page"] = Page(b"<html>", kind="text/html")
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02x")
    for arguments, status, said in (
        (("pull", "nonsense"), 2, "is not a source"),
        (("pull", "owner/repo::99"), 2, "between -20 and 20"),
        (("pull", f"{site.address}/none"), 1, "is not there (HTTP 404)"),
        (("pull", f"{site.address}/page"), 1, "web page"),
        (("pull", f"{site.address}/a.safetensors", "--limit", "1KB"), 1, "more than the limit"),
        (("pull", f"{site.address}/a.safetensors", "--limit", "much"), 2, "largest_adapter"),
        (("pull", tmp_path / "x.safetensors"), 2, "pickle"),
        (("pull", tmp_path / "none.safetensors"), 2, "no such file"),
        (("show", "abcdef1"), 2, "gesso lora list"),
        (("show", "owner/repo"), 2, "gesso lora list"),
        (("remove", "what is this"), 2, "gesso lora list"),
    ):
        outcome = call(capsys, "lora", *arguments)
        assert (outcome.status, said in outcome.error) == (status, True), outcome
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(CONTENT)
    assert "a file of your own" in call(capsys, "lora", "remove", mine, "--yes").error
    assert mine.is_file()
    assert "LoRA of rank 2 for flux" in call(capsys, "lora", "show", mine).out


@pytest.mark.parametrize("command", ["list", "show", "pull", "remove"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    outcome = call(capsys, "lora", command, "--help")
    assert (outcome.status, outcome.err, "--json" in outcome.out) == (0, "", True)


def test_tokens_are_shown_as_stars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CIVITAI", "REPLICATE"):
        monkeypatch.setenv(f"GESSO_{name}_TOKEN", "a-secret")
    outcome = call(capsys, "config")
    assert "a-secret" not in outcome.out + outcome.err
    assert "replicate_token" in outcome.out


def test_ctrl_c_says_what_is_kept(site: Site, tmp_path: Path) -> None:
    site.pages["/a.safetensors"] = Page(lora(rank=16, width=1024), pause=0.1)
    process = spawn("lora", "pull", f"{site.address}/a.safetensors", folder=tmp_path)
    wait_until(lambda: site.sent("/a.safetensors") > 20_000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in errors
    assert "Traceback" not in errors
