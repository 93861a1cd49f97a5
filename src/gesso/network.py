"""Asking other machines for bytes: the one guard between words of a user and the machines that gesso can reach.

A name is resolved here, every address that it has is checked, and the connection goes to a checked address itself, so
that nothing can be looked up anew in between. Redirects are followed by hand, each checked like the first. A token goes
to its own origin and nowhere else. What is asked is never logged: signed addresses are secrets too.
Not here: what is asked for (`adapters/sources_*`), hubs with clients of their own (`weights/hub_clients`).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from gesso.errors import CancelledError, GessoError, MissingError, RequestError, RunError

if TYPE_CHECKING:
    import httpx2

_TIMEOUT = 20.0  # seconds in which a host must say something
_SLOW_WINDOW = 30.0  # seconds in which
_SLOW_BYTES = 1 << 15  # so many bytes must come
_LONGEST_TALK = 90.0  # seconds for what should take one
_MOST_HOPS = 6
_LARGEST_ANSWER = 1 << 23  # bytes of JSON
_LONGEST_WAIT = 60.0  # seconds that a host may ask for
_TICK = 0.1  # seconds between looks at whether to stop
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504, 520, 522, 524)

# Services of clouds that tell a machine its own secrets: no file lies there, so that no setting allows them.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _SecretFilter(logging.Filter):
    """Drops what the library beneath logs while it asks: at level DEBUG that is every header, signed addresses too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_THREAD, "asking", False)


_SECRETS = _SecretFilter()
_THREAD = threading.local()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Result = TypeVar("_Result")


class Stop:
    """An event that counts as set when another one is, too: what is stopped alone, or with what it is a part of."""

    def __init__(self, outer: threading.Event | None = None) -> None:
        self._own = threading.Event()
        self._outer = outer or self._own

    def set(self) -> None:
        """Stop this alone."""
        self._own.set()

    def is_set(self) -> bool:
        """Whether it was stopped, or what it is a part of."""
        return self._own.is_set() or self._outer.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it is stopped; returns whether it is."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            self._own.wait(min(left, _TICK))
        return self.is_set()


class NetworkError(RunError):
    """A host failed or refused. `passing`: trying again may help, after `wait` seconds; `status` is HTTP's."""

    def __init__(self, message: str, *, passing: bool, status: int = 0, wait: float = 0.0) -> None:
        super().__init__(message)
        self.passing = passing
        self.status = status
        self.wait = wait


@dataclass(frozen=True)
class Token:
    """A secret for one origin ("https://civitai.com"): it goes nowhere else, and is not shown."""

    origin: str
    secret: str = field(repr=False)

    def headers_for(self, url: httpx2.URL) -> dict[str, str]:
        """What to send with a request for this address."""
        own = urlsplit(self.origin)
        fitting = _origin(url.scheme, url.host, url.port) == _origin(own.scheme, own.hostname or "", own.port)
        return {"Authorization": f"Bearer {self.secret}"} if fitting else {}


@dataclass(frozen=True)
class Answer:
    """What a host answered: header names in small letters, the address that it came from at last, and its bytes."""

    status: int
    headers: Mapping[str, str]
    url: str
    pieces: Iterator[bytes]


class Network:
    """Where bytes come from. One for each thing that is fetched; may be used by several threads.

    Args:
        allow_private: whether private and loopback addresses, and plain http to them, are allowed.
        plain_http: whether it is allowed everywhere, for what may come altered.
        cancelled: ends what is under way with CancelledError once it is set. So does `stop`, for this network alone.
    """

    def __init__(
        self, *, allow_private: bool, plain_http: bool = False, cancelled: threading.Event | None = None
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingError("the library httpx2", "pip install 'gesso[diffusion]'") from error
        self._allow_private, self._plain_http = allow_private, plain_http
        self.stop = Stop(cancelled)
        self._stack = ExitStack()
        for part in ("connection", "http11", "proxy"):
            logging.getLogger(f"httpcore2.{part}").addFilter(_SECRETS)
        # Nothing is kept alive: a connection that was checked for one name must not serve another at that address.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._proxies = {scheme: url for scheme, url in urllib.request.getproxies().items() if scheme in _PORTS}
        self._direct = self._stack.enter_context(httpx2.HTTPTransport(limits=limits))
        self._proxied = {
            scheme: self._stack.enter_context(httpx2.HTTPTransport(limits=limits, proxy=url))
            for scheme, url in self._proxies.items()
        }

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def open(
        self, url: str, *, headers: Mapping[str, str] | None = None, token: Token | None = None
    ) -> Iterator[Answer]:
        """GET an address, through redirects; the body is read as `pieces` are asked for.

        Raises:
            RequestError: no address that may be asked.
            NetworkError: it cannot be reached, refuses, redirects to what may not be asked, or is too slow.
            CancelledError: `stop` is set.
        """
        import httpx2

        place = _parsed(url)
        for hop in range(_MOST_HOPS):
            sent = dict(headers or {}) | (token.headers_for(place) if token else {})
            with _told(place.host), self._ask(place, sent, first=hop == 0) as response:
                target = response.headers.get("Location")
                if response.status_code not in _REDIRECTS or not target:
                    _check_status(response, place)
                    yield Answer(response.status_code, response.headers, str(place), self._pieces(response, place))
                    return
            try:
                place = place.join(target)
            except (httpx2.InvalidURL, ValueError) as error:
                raise NetworkError(f"{place.host} redirects to what is no address", passing=False) from error
        raise NetworkError(f"{place.host} redirects in circles", passing=False)

    def json(self, url: str, *, token: Token | None = None) -> Any:
        """What an address answers, as JSON. Raises as `open`."""

        def read() -> bytes:
            with self.open(url, headers={"Accept": "application/json"}, token=token) as answer:
                body = bytearray()
                for piece in answer.pieces:
                    body += piece
                    if len(body) > _LARGEST_ANSWER:
                        raise NetworkError(f"{shown(url)} answers with more than was asked for", passing=False)
                return bytes(body)

        try:
            return json.loads(self.interruptible(read))
        except (ValueError, RecursionError) as error:
            raise NetworkError(f"{shown(url)} answers with what is no JSON", passing=False) from error

    def interruptible(self, work: Callable[[], _Result]) -> _Result:
        """Do what asks for little in a thread that is left alone once `stop` is set, or once it takes too long.

        Raises what it raises, CancelledError, or NetworkError.
        """
        results: list[_Result] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        began = time.monotonic()
        while thread.is_alive():
            if self.stop.is_set():
                raise CancelledError
            if time.monotonic() - began > _LONGEST_TALK:
                raise NetworkError(f"no whole answer came within {_LONGEST_TALK:.0f} seconds", passing=True)
            thread.join(_TICK)
        if failures:
            raise failures[0]
        return results[0]

    @contextmanager
    def _ask(self, place: httpx2.URL, headers: Mapping[str, str], *, first: bool) -> Iterator[httpx2.Response]:
        """One request, to an address that was checked."""
        import httpx2

        from gesso import __version__

        if self.stop.is_set():
            raise CancelledError
        hosts, proxied = self._checked(place, first=first)
        transport = self._proxied[place.scheme] if proxied else self._direct
        own = {"Host": place.netloc.decode("ascii"), "User-Agent": f"gesso/{__version__}"}
        own |= {"Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
        extensions = {"timeout": httpx2.Timeout(_TIMEOUT).as_dict(), "sni_hostname": place.raw_host.decode("ascii")}
        for host in hosts:
            request = httpx2.Request(
                "GET", place.copy_with(host=host, fragment=None), headers=own | dict(headers), extensions=extensions
            )
            try:
                with _unlogged():
                    response = transport.handle_request(request)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if host == hosts[-1]:
                    raise
                continue
            try:
                yield response
            finally:
                response.close()
            return

    def _checked(self, place: httpx2.URL, *, first: bool) -> tuple[list[str], bool]:
        """Addresses that may be connected to, and whether a proxy does so. Raises RequestError, NetworkError."""
        host = place.host
        proxied = place.scheme in self._proxied and not urllib.request.proxy_bypass(host)
        if place.scheme not in _PORTS or not host:
            raise _refusal(place, "an https address", "", first)
        try:
            found = addresses(place.raw_host.decode("ascii"))
        except NetworkError:
            if proxied and self._allow_private:
                return [host], True  # only the proxy can look, and looking is not asked for
            raise
        for address in found:
            if problem := problem_with(address, allow_private=self._allow_private):
                raise _refusal(place, "at a public address", problem, first)
        if place.scheme == "http" and not (self._plain_http or all(is_private(address) for address in found)):
            raise _refusal(place, "an https address", "what comes by plain http can be altered on its way", first)
        return [str(address) for address in found], proxied

    def _pieces(self, response: httpx2.Response, place: httpx2.URL) -> Iterator[bytes]:
        """The body as it comes. Raises CancelledError, and NetworkError for one that only drips."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise NetworkError(f"{place.host} packs what it sends, which was not asked for", passing=False)
        began, come = time.monotonic(), 0
        with _told(place.host):
            for piece in response.iter_raw():
                if self.stop.is_set():
                    raise CancelledError
                yield piece
                come += len(piece)
                if (passed := time.monotonic() - began) > _SLOW_WINDOW:
                    if come < _SLOW_BYTES:
                        message = f"{place.host} sent only {come} bytes in {passed:.0f} seconds"
                        raise NetworkError(message, passing=True)
                    began, come = time.monotonic(), 0


_PORTS = {"http": 80, "https": 443}


def addresses(host: str) -> list[Address]:
    """Every address that a host's name has, or the one that it is. Raises NetworkError for a name that has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        # A zone ("fe80::1%eth0") says where the address is meant, and nothing of what it is.
        return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))
    except (OSError, ValueError) as error:
        raise NetworkError(f"{host} is not to be found; look at its name, and the network", passing=True) from error


def problem_with(address: Address, *, allow_private: bool) -> str:
    """Why an address may not be connected to, "" where it may."""
    every = [address, *_within(address)]
    if any(each in _METADATA for each in every):
        return f"{address} is where clouds keep a machine's secrets"
    if any(each.is_link_local or each.is_multicast or each.is_unspecified for each in every):
        return f"{address} is no address of a host in the internet"
    if any(is_private(each) for each in every) and not allow_private:
        return f"{address} is private; to allow that, set allow_private_addresses (GESSO_ALLOW_PRIVATE_ADDRESSES=1)"
    return ""


def is_private(address: Address) -> bool:
    """Whether an address is not of the public internet."""
    return not address.is_global or any(not each.is_global for each in _within(address))


def _within(address: Address) -> list[Address]:
    """Addresses of IPv4 that one of IPv6 leads to: mapped, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def shown(url: str) -> str:
    """An address as it may be told: without account, query and fragment, which may hold secrets."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return "an address"


def _parsed(url: str) -> httpx2.URL:
    import httpx2

    try:
        return httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        raise RequestError("source", shown(url), "an address that can be asked") from error


def _origin(scheme: str, host: str, port: int | None) -> tuple[str, str, int | None]:
    return scheme.lower(), host.lower(), port or _PORTS.get(scheme.lower())


def _refusal(place: httpx2.URL, allowed: str, why: str, first: bool) -> GessoError:
    if first:
        return RequestError("source", f"{place.scheme}://{place.host}", allowed, why)
    reason = f": {why}" if why else ""
    return NetworkError(
        f"a redirect leads to {place.scheme}://{place.host}, which is not {allowed}{reason}", passing=False
    )


def _check_status(response: httpx2.Response, place: httpx2.URL) -> None:
    """Raise NetworkError unless the answer is one to read."""
    status = response.status_code
    if status in (200, 206):
        return
    asked = response.headers.get("Retry-After", "").strip()
    wait = min(float(asked), _LONGEST_WAIT) if asked.isascii() and asked.isdigit() and len(asked) < 9 else 0.0
    raise NetworkError(f"{place.host} answers with HTTP {status}", passing=status in _PASSING, status=status, wait=wait)


@contextmanager
def _unlogged() -> Iterator[None]:
    _THREAD.asking = True
    try:
        yield
    finally:
        _THREAD.asking = False


@contextmanager
def _told(host: str) -> Iterator[None]:
    """Make errors of the library gesso's own; none of them quotes what was asked."""
    import httpx2

    try:
        yield
    except httpx2.TimeoutException as error:
        raise NetworkError(f"{host} did not answer within {_TIMEOUT:.0f} seconds", passing=True) from error
    except httpx2.ConnectError as error:
        if "certificate" in str(error).lower():
            raise NetworkError(f"{host} has no certificate that holds", passing=False) from error
        raise NetworkError(f"{host} cannot be reached; look at the network (HTTPS_PROXY)", passing=True) from error
    except httpx2.TransportError as error:
        raise NetworkError(f"{host} cut the connection", passing=True) from error
