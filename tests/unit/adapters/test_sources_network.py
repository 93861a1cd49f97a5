"""The guard: which addresses are asked, at the first hop and at each redirect, and where tokens go."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gesso import network
from gesso.errors import CancelledError, GessoError, RequestError
from gesso.network import Network, NetworkError, Token, problem_with
from tests.adapter_server import Page, Site, served

PRIVATE = "127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 100.64.0.1 ::1 fd00::1 ::ffff:10.0.0.1 64:ff9b::7f00:1"
NEVER = "169.254.169.254 169.254.1.1 100.100.100.200 168.63.129.16 fd00:ec2::254 fe80::1 224.0.0.1 0.0.0.0 ::"
NEVER_WITHIN = "::ffff:169.254.169.254 64:ff9b::a9fe:a9fe"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    with served(Site({"/a": Page(b"content")})) as serving:
        yield serving


def read(url: str, *, allow_private: bool = True, token: Token | None = None) -> bytes:
    with Network(allow_private=allow_private) as asking, asking.open(url, token=token) as answer:
        return b"".join(answer.pieces)


def refusal(kind: type[GessoError], url: str, *, allow_private: bool = True) -> str:
    with pytest.raises(kind) as caught:
        read(url, allow_private=allow_private)
    return str(caught.value)


def test_which_addresses_may_be_asked() -> None:
    for text in PRIVATE.split():
        address = ipaddress.ip_address(text)
        assert "allow_private_addresses" in problem_with(address, allow_private=False), text
        assert problem_with(address, allow_private=True) == "", text
    for text in f"{NEVER} {NEVER_WITHIN}".split():
        assert problem_with(ipaddress.ip_address(text), allow_private=True), text
    for text in ("8.8.8.8", "2606:4700::1111"):
        assert problem_with(ipaddress.ip_address(text), allow_private=False) == "", text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_loopback_by_any_spelling_is_refused_before_a_connection(site: Site, host: str) -> None:
    port = site.address.rpartition(":")[2]
    for scheme in ("http", "https"):
        assert "public address" in refusal(RequestError, f"{scheme}://{host}:{port}/a", allow_private=False)
    assert site.asked == []


def test_plain_http_goes_to_allowed_private_addresses_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(f"{site.address}/a") == b"content"
    monkeypatch.setattr(network, "addresses", lambda host: [ipaddress.ip_address("8.8.8.8")])
    assert "https" in refusal(RequestError, "http://public.example/a")
    assert "https" in refusal(RequestError, "ftp://public.example/a")


def test_redirects_are_checked_like_the_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "https://[fe80::1]/",
        "gopher://h/",
    ):
        site.pages["/r"] = Page(redirect=target)
        assert "redirect" in refusal(NetworkError, f"{site.address}/r")
    site.pages["/r"] = Page(redirect="/r")
    assert "circles" in refusal(NetworkError, f"{site.address}/r")


def test_a_public_host_that_sends_on_to_a_private_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that 127.0.0.2 counts as public is pretended."""
    genuine = network.problem_with
    monkeypatch.setattr(
        network, "problem_with", lambda address, **named: genuine(address, **named) * (str(address) != "127.0.0.2")
    )
    with served(Site({"/r": Page(redirect=f"{site.address}/a")}), "127.0.0.2") as public:
        message = refusal(NetworkError, f"{public.address}/r", allow_private=False)
    assert "redirect leads to http://127.0.0.1" in message
    assert "allow_private_addresses" in message
    assert site.asked == []


def test_a_proxy_is_asked_for_the_checked_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Site({"/a": Page(b"by proxy")})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        assert "public address" in refusal(RequestError, "http://localhost/a", allow_private=False)
        assert "not to be found" in refusal(NetworkError, "http://no-such-host.invalid/a", allow_private=False)
        assert proxy.asked == []
        assert read("http://localhost:81/a") == b"by proxy"
        assert proxy.asked[0].headers["Host"] == "localhost:81"
        assert read("http://no-such-host.invalid/a") == b"by proxy"  # only the proxy can resolve it, and may
        assert "keep a machine's secrets" in refusal(RequestError, "http://169.254.169.254/a")


def test_a_name_is_looked_up_once_and_the_checked_address_is_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private when it is asked (rebinding) gains nothing."""
    port = site.address.rpartition(":")[2]
    asked: list[str] = []
    genuine = socket.getaddrinfo

    def look_up(host: str, *rest: object, **named: object) -> object:
        asked.append(str(host))
        return genuine("127.0.0.1" if host == "rebinding.example" else host, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert read(f"http://rebinding.example:{port}/a") == b"content"
    assert asked.count("rebinding.example") == 1
    assert site.asked[0].headers["Host"] == f"rebinding.example:{port}"


def test_tokens_go_to_their_own_origin_alone(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(Site({"/b": Page(b"bytes")})) as other:
        site.pages["/r"] = Page(redirect=f"{other.address}/b?signature=secret-two")
        token = Token(site.address, "secret-one")
        assert read(f"{site.address}/r", token=token) == b"bytes"
        assert site.asked[-1].headers["Authorization"] == "Bearer secret-one"
        assert "Authorization" not in other.asked[-1].headers
        other.pages["/back"] = Page(redirect=f"{site.address}/a")
        read(f"{other.address}/back", token=token)
        assert "Authorization" not in other.asked[-1].headers
        assert site.asked[-1].headers["Authorization"] == "Bearer secret-one"
    assert "secret" not in f"{token!r} {caplog.text}"
    site.pages["/r"] = Page(statuses=[403] * 9)
    assert "secret" not in refusal(NetworkError, f"{site.address}/r?token=secret-three")


def test_hosts_that_fail(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_TIMEOUT", 0.2)
    assert "not to be found" in refusal(NetworkError, "https://no-such-host.invalid/a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert "cannot be reached" in refusal(NetworkError, f"http://127.0.0.1:{free.getsockname()[1]}/a")
    site.pages["/z"] = Page(b"x" * 100, encoding="gzip")
    assert "packs" in refusal(NetworkError, f"{site.address}/z")
    site.pages["/drip"] = Page(endless=True, pause=0.02)
    monkeypatch.setattr(network, "_SLOW_WINDOW", 0.1)
    monkeypatch.setattr(network, "_SLOW_BYTES", 1 << 30)
    assert "sent only" in refusal(NetworkError, f"{site.address}/drip")
    site.silent = True
    assert "did not answer" in refusal(NetworkError, f"{site.address}/a")
    site.silent = False


def test_answers_as_json_are_bounded_and_can_be_cancelled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/j"] = Page(b'{"a": [1]}')
    cancelled = threading.Event()
    with Network(allow_private=True, cancelled=cancelled) as asking:
        assert asking.json(f"{site.address}/j") == {"a": [1]}
        with pytest.raises(NetworkError, match="no JSON"):
            asking.json(f"{site.address}/a")
        monkeypatch.setattr(network, "_LARGEST_ANSWER", 5)
        with pytest.raises(NetworkError, match="more than"):
            asking.json(f"{site.address}/j")
        site.silent = True
        threading.Timer(0.1, cancelled.set).start()
        with pytest.raises(CancelledError):
            asking.json(f"{site.address}/j")
        site.silent = False


def test_a_certificate_has_to_be_of_the_name_though_the_address_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = own_certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with served(Site({"/a": Page(b"content")}), context=context) as secure:
        address = f":{secure.address.rpartition(':')[2]}/a"
        assert "no certificate that holds" in refusal(NetworkError, f"https://localhost{address}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert read(f"https://localhost{address}") == b"content"
        assert "no certificate that holds" in refusal(NetworkError, f"https://127.0.0.1{address}")


def own_certificate(folder: Path, name: str) -> Path:
    """A certificate for a name, signed by itself, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "own.pem"
    path.write_bytes(secret + built.public_bytes(serialization.Encoding.PEM))
    return path


def test_importing_the_guard_loads_no_http_library() -> None:
    code = "import sys, gesso.network; assert not {'httpx2', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
