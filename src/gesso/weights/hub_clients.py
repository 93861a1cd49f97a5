"""The two hubs behind one protocol, each spoken to by its own client: what a repository holds, and a file's bytes.

Errors become Gesso's own here, one line with the way out. A token goes to its own hub's host: where a hub redirects
to another host for the bytes, both clients drop it. Not here: where files go, checks, resuming (`hub`, `hub_transfer`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from gesso.errors import GessoError, MissingError, RequestError, RunError
from gesso.settings import load_settings

HubName = Literal["huggingface", "modelscope"]
AGAIN = "the same command goes on where it stopped"
_TIMEOUT = 20.0  # seconds in which a hub must say something
_OFFLINE = "HF_HUB_OFFLINE"  # who says so to Hugging Face's own tools means every hub
_BUSY = 429
_BROKEN = 500  # and above: the hub's own fault
_PIECE = 1 << 16  # bytes read at once; what a cut connection loses at most
_RANGE = re.compile(r"bytes (\d+)-")


class TransientError(RunError):
    """The connection or the hub failed in a way that may pass: worth trying again."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository as the hub states it; `git_sha1` is of git's blob, for files that are small."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a repository holds at one revision: the commit, where the hub tells it."""

    repository: str
    revision: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Bytes of a file from `start` on, which may be 0 although more was asked for."""

    start: int
    pieces: Iterator[bytes]


class Hub(Protocol):
    """A hub, with its token in its hands."""

    host: str

    def listing(self, repository: str, revision: str | None) -> Listing:
        """What lies in the repository. Raises GessoError: gated, absent, unknown revision, unreachable."""
        ...

    def open(self, listing: Listing, name: str, start: int) -> AbstractContextManager[Answer]:
        """A file's bytes from `start` on. Raises TransientError where trying again may help, else GessoError."""
        ...


def connect(name: HubName, command: str, token: str | None = None) -> Hub:
    """The hub of that name. Raises MissingError where its client is not installed, RequestError where offline is set.

    `command` is what fetches once errors are mended; `token` is used instead of that of the settings.
    """
    settings = load_settings()
    if settings.offline or os.environ.get(_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE"):
        holder = "offline" if settings.offline else _OFFLINE
        way_out = f"the network was not touched; unset {holder} (gesso config), then: {command}"
        raise RequestError("offline", True, "off, as fetching needs", way_out)
    try:
        if name == "huggingface":
            import huggingface_hub  # noqa: F401  # pyright: ignore[reportUnusedImport]

            known = settings.hf_token.get_secret_value() if settings.hf_token else None
            return HuggingFace(token or known, command)
        import modelscope_hub  # noqa: F401  # pyright: ignore[reportUnusedImport]

        known = settings.modelscope_token.get_secret_value() if settings.modelscope_token else None
        return ModelScope(token or known, command)
    except ImportError as error:
        extra = "diffusion" if name == "huggingface" else "modelscope"
        raise MissingError(f"the client of {name}", f"pip install 'gesso[{extra}]'") from error


class HuggingFace:
    """Hugging Face, or what HF_ENDPOINT names, by `huggingface_hub`.

    Its own downloads begin anew when a process ends (from release 2 on), and 30 GB should not: so its session is used,
    with its headers and errors, and plain HTTP instead of xet.
    """

    def __init__(self, token: str | None, command: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import build_hf_headers

        self._endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._token = token or None  # None: what the library finds by itself (HF_TOKEN, `hf auth login`)
        self._command = command
        self._api = HfApi(endpoint=self._endpoint, token=self._token)
        self._headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
        self.host = urlsplit(self._endpoint).netloc

    def listing(self, repository: str, revision: str | None) -> Listing:
        with self._told(repository, revision):
            found = self._api.model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
            files = tuple(
                HubFile(
                    name=sibling.rfilename,
                    size=sibling.size or 0,
                    sha256=sibling.lfs.sha256 if sibling.lfs else None,
                    git_sha1=None if sibling.lfs else sibling.blob_id,
                )
                for sibling in found.siblings or ()
            )
        return Listing(repository=repository, revision=found.sha or revision or "main", files=files)

    def address(self, listing: Listing, name: str) -> tuple[str, str]:
        """Where a file's bytes are, and the token that may be sent to this hub's own host for them, "" if none."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(listing.repository, name, revision=listing.revision, endpoint=self._endpoint)
        return url, str(self._headers.get("authorization", "")).removeprefix("Bearer ")

    @contextmanager
    def open(self, listing: Listing, name: str, start: int) -> Iterator[Answer]:
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        url, _ = self.address(listing, name)
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        with (
            self._told(listing.repository, listing.revision),
            get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as answer,
        ):
            hf_raise_for_status(answer)
            yield Answer(start=_begins(answer.headers.get("Content-Range")), pieces=answer.iter_bytes())

    @contextmanager
    def _told(self, repository: str, revision: str | None) -> Iterator[None]:
        """Make Gesso's errors of the client's."""
        from huggingface_hub import errors

        page = f"{self._endpoint}/{repository}"
        try:
            yield
        except GessoError:
            raise
        except errors.GatedRepoError as error:
            raise _gated(repository, page, "hf_token", self._command) from error
        except errors.RevisionNotFoundError as error:
            raise RequestError("revision", revision, f"a revision of {repository}", f"see {page}/tree/main") from error
        except errors.RepositoryNotFoundError as error:
            raise _absent(repository, self.host, "hf_token") from error
        except errors.HfHubHTTPError as error:
            raise _refused(repository, self.host, error.response.status_code, "hf_token") from error
        except Exception as error:
            raise _unreachable(error, self.host, "HF_ENDPOINT") from error


class ModelScope:
    """ModelScope, or what MODELSCOPE_ENDPOINT names, by `modelscope_hub`."""

    def __init__(self, token: str | None, command: str) -> None:
        from modelscope_hub import HubApi, HubConfig

        # "" is no token: without one the client would read the pickled cookies of other programs.
        config = HubConfig(token=token or os.environ.get("MODELSCOPE_API_TOKEN", ""))
        self._api = HubApi(config)
        self._command = command
        self._endpoint = self._api.legacy.endpoint
        self.host = urlsplit(self._endpoint).netloc

    def listing(self, repository: str, revision: str | None) -> Listing:
        revision = revision or "master"
        with self._told(repository, revision):
            found = self._api.list_repo_files(repository, "model", revision=revision)
        files = [file for file in found if not file.is_dir]
        return Listing(
            repository=repository,
            revision=revision,
            files=tuple(HubFile(name=file.path, size=file.size, sha256=file.sha256 or None) for file in files),
        )

    @contextmanager
    def open(self, listing: Listing, name: str, start: int) -> Iterator[Answer]:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self._told(listing.repository, listing.revision):
            answer = self._api.legacy.download_stream(
                listing.repository, "model", name, listing.revision, headers=headers
            )
            with answer:
                yield Answer(start=_begins(answer.headers.get("Content-Range")), pieces=answer.iter_content(_PIECE))

    @contextmanager
    def _told(self, repository: str, revision: str) -> Iterator[None]:
        """Make Gesso's errors of the client's."""
        from modelscope_hub import errors

        try:
            yield
        except GessoError:
            raise
        except errors.PermissionDeniedError as error:
            page = f"{self._endpoint}/models/{repository}"
            raise _gated(repository, page, "modelscope_token", self._command) from error
        except errors.NotExistError as error:
            raise RunError(
                f"{repository} at revision {revision} is not to be found on {self.host}; see {self._endpoint}/models/"
                f"{repository}, and the setting modelscope_token if it is private"
            ) from error
        except errors.APIError as error:
            raise _refused(repository, self.host, error.status_code or _BROKEN, "modelscope_token") from error
        except Exception as error:
            raise _unreachable(error, self.host, "MODELSCOPE_ENDPOINT") from error


def _begins(content_range: Any) -> int:
    """Where the bytes of an answer begin: 0 unless it says otherwise."""
    found = _RANGE.match(str(content_range or ""))
    return int(found[1]) if found else 0


def _gated(repository: str, page: str, setting: str, command: str) -> MissingError:
    variable = f"GESSO_{setting.upper()}"
    return MissingError(
        f"leave to fetch {repository} (accept its licence at {page} and give a token of that account as the setting "
        f"{setting} or {variable})",
        command,
    )


def _absent(repository: str, host: str, setting: str) -> RunError:
    return RunError(f"{repository} is not to be found on {host}, or is private: that needs the setting {setting}")


def _refused(repository: str, host: str, status: int, setting: str) -> RunError:
    """What an HTTP status means to a person."""
    if status == _BUSY:
        return TransientError(f"{host} asks for patience (HTTP 429) with {repository}; wait a while, {AGAIN}")
    if status >= _BROKEN:
        return TransientError(f"{host} is in trouble (HTTP {status}) with {repository}; wait a while, {AGAIN}")
    if status in (401, 403):
        return RunError(f"{host} refuses {repository} (HTTP {status}); look at the token in the setting {setting}")
    return RunError(f"{host} refuses {repository} (HTTP {status}); see its page there")


def _unreachable(error: Exception, host: str, variable: str) -> GessoError:
    """A failed connection as one line; other exceptions are faults, and come back as themselves told."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # the clients stand on several HTTP libraries
    if "TimeoutException" in kinds or isinstance(error, TimeoutError) or "Timeout" in kinds:
        return TransientError(f"{host} did not answer within {_TIMEOUT:.0f} seconds; {AGAIN}")
    if kinds & {"TransportError", "RequestException", "ConnectionError"}:
        reason = "cannot be reached" if "Connect" in type(error).__name__ else "was cut off"
        return TransientError(f"{host} {reason}; look at the network (HTTPS_PROXY, {variable}), {AGAIN}")
    if kinds & {"OfflineModeIsEnabled"}:
        return RequestError("offline", True, "off, as fetching needs", "unset HF_HUB_OFFLINE")
    return RunError(f"the client of {host} failed ({type(error).__name__}: {error})")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the clients' own warnings: what is worth saying is said once, as an error. Around all of the threads."""
    talkers = [logging.getLogger(name) for name in ("huggingface_hub", "modelscope_hub")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
