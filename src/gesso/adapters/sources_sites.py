"""Asking a site what a source is: the address of one file, its revision, and the size and SHA-256 that the site states.

What a site answers is not trusted: a name is only ever shown, an address is checked before it is asked (`network`).
Not here: how sources are written (`sources`), fetching the bytes (`sources_download`), archives (`sources_archive`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit

from gesso.adapters.formats.peft import CONFIG
from gesso.adapters.sources import Site, Source
from gesso.errors import CancelledError, RequestError, RunError
from gesso.network import Network, NetworkError, Stop, Token
from gesso.settings import Settings, load_settings
from gesso.weights.hub_clients import HubFile, HuggingFace, Listing, TransientError, connect, quiet

REPLICATE = "https://replicate.com"
TRIES = 5  # without a single byte between them
PAUSE = 1.0  # seconds before the second try; twice as many before each other
_SHOWN = 8  # names of files or versions in an error
_LONGEST_NAME = 120
_ADAPTER_KINDS = ("lora", "locon", "lycoris", "dora")  # what CivitAI calls adapters
_WEIGHTS = ".safetensors"

# How CivitAI calls base models of our families: what its names begin with.
_BASES: dict[str, tuple[str, ...]] = {
    "sdxl": ("sdxl", "illustrious", "pony", "noobai", "animagine"),
    "flux": ("flux.1",),
    "z-image": ("zimage", "z-image", "z image"),
    "qwen-image": ("qwen",),
    "hunyuan-video": ("hunyuan video", "hunyuanvideo"),
}

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One file to fetch. `size` and `sha256` are what the site states, None and "" where it does not.

    `revision` is a commit or a version, "" where the site has none; `member` a file in it if it is an archive; `about`
    the size where it is known roughly; `login` what to do where the site wants an account; `facts` what else it says.
    `config` is PEFT's configuration that lies beside it.
    """

    url: str = field(repr=False)
    name: str
    token: Token | None = None
    revision: str = ""
    size: int | None = None
    about: int = 0
    sha256: str = ""
    member: str = ""
    login: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    config: Remote | None = None


def look_up(source: Source, network: Network, *, family: str = "", tokens: Mapping[Site, str] | None = None) -> Remote:
    """What a source is now.

    Args:
        source: not a file of this machine.
        network: to ask by.
        family: chooses among a CivitAI model's versions where none is named.
        tokens: used instead of those of the settings, by site.

    Raises:
        RequestError: it names nothing that can be fetched: several files, a checkpoint, no safetensors; offline is set.
        MissingError: a licence has to be accepted first, or a library is not installed.
        RunError: the site fails, refuses, or has no such thing.
        CancelledError: the network was stopped.
    """
    settings, token = load_settings(), (tokens or {}).get(source.site, "")
    if source.site == "huggingface":
        return _on_hub(source, network, token)
    if settings.offline:
        raise RequestError("offline", True, "off, as fetching needs", "unset GESSO_OFFLINE (gesso config)")
    if source.site == "civitai":
        secret = token or _secret(settings, "civitai_token")
        return _on_civitai(source, network, family, secret, settings.civitai_endpoint)
    if source.site == "replicate":
        version = f"/versions/{source.revision}" if source.revision else ""
        secret = token or _secret(settings, "replicate_token")
        return Remote(
            url=f"{REPLICATE}/{source.repository}{version}/_weights",
            name=source.repository,
            token=Token(REPLICATE, secret) if secret else None,
            revision=source.revision,
            member=source.file,
            login=_login("replicate_token"),
        )
    name = unquote(urlsplit(source.url).path.rpartition("/")[2])
    return Remote(url=source.url, name=shown_name(name), member=source.file)


def persistent(work: Callable[[], _Result], stop: Stop) -> _Result:
    """Do it, again after ever longer pauses where it fails in a way that may pass. Raises its last failure."""
    for attempt in range(TRIES):
        try:
            return work()
        except (NetworkError, TransientError) as error:
            passing = not isinstance(error, NetworkError) or error.passing
            if not passing or attempt == TRIES - 1:
                raise
            pause_after(error, attempt, stop)
    raise AssertionError("the last try returns or raises")


def pause_after(error: RunError, failures: int, stop: Stop) -> None:
    """Wait as long as the host asks for, at least twice as long each time. Raises CancelledError."""
    asked = error.wait if isinstance(error, NetworkError) else 0.0
    if stop.wait(max(PAUSE * 2**failures, asked)):
        raise CancelledError


def shown_name(name: str) -> str:
    """A name that somebody else chose, as it may be shown: never a path."""
    plain = "".join(mark for mark in name.replace("\\", "/").rpartition("/")[2] if mark.isprintable()).strip(" .")
    return plain[:_LONGEST_NAME] or "adapter"


def _secret(settings: Settings, name: str) -> str:
    found = getattr(settings, name)
    return found.get_secret_value() if found else ""


def _login(setting: str) -> str:
    return f"give a token of an account that may have it as the setting {setting} (GESSO_{setting.upper()})"


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def _on_hub(source: Source, network: Network, token: str) -> Remote:
    hub = connect("huggingface", f"gesso lora pull {source.shown}", token or None)
    assert isinstance(hub, HuggingFace)

    def ask() -> Listing:
        return hub.listing(source.repository, source.revision or None)

    with quiet():
        listing = persistent(lambda: network.interruptible(ask), network.stop)
    files = {file.name: file for file in listing.files}
    weights = sorted(name for name in files if name.lower().endswith(_WEIGHTS))
    where = f"{source.repository} at {listing.revision[:12]}"
    if source.file and source.file not in files:
        raise RunError(f"{where} holds no {source.file}; it has {_some(weights) or f'no {_WEIGHTS}'}")
    if not weights:
        raise RunError(f"{where} holds no {_WEIGHTS} file; pickles and other files are never read")
    if not source.file and len(weights) > 1:
        way_out = f"write {source.shown}/FILE with one of: {_some(weights)}"
        raise RequestError("source", source.shown, "one adapter: the repository has several files", way_out)
    file = files[source.file or weights[0]]
    config = files.get(str(PurePosixPath(file.name).with_name(CONFIG)))
    remote = _hub_file(hub, listing, file)
    return replace(remote, config=_hub_file(hub, listing, config) if config else None, facts={"file": file.name})


def _hub_file(hub: HuggingFace, listing: Listing, file: HubFile) -> Remote:
    url, secret = hub.address(listing, file.name)
    return Remote(
        url=url,
        name=shown_name(file.name),
        token=Token(_origin_of(url), secret) if secret else None,
        revision=listing.revision,
        size=file.size,
        sha256=(file.sha256 or "").lower(),
        login=f"accept its terms on its page if it has some, and {_login('hf_token')}",
    )


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


# ---- CivitAI --------------------------------------------------------------------------------------------------------


def _on_civitai(source: Source, network: Network, family: str, secret: str, endpoint: str) -> Remote:
    endpoint = endpoint.rstrip("/")
    token = Token(endpoint, secret) if secret else None

    def ask(path: str, what: str) -> dict[str, object]:
        try:
            found = persistent(lambda: network.json(f"{endpoint}/api/v1/{path}", token=token), network.stop)
        except NetworkError as error:
            if error.status == 404:
                raise RunError(f"CivitAI has no {what}; {_NUMBERS}") from error
            if error.status in (401, 403):
                raise RunError(f"CivitAI refuses {what} (HTTP {error.status}); {_login('civitai_token')}") from error
            raise
        return _record(found)

    if source.version:
        version = ask(f"model-versions/{source.version}", f"version {source.version} of a model")
        kind, model = _text(_record(version.get("model")).get("type")), version.get("modelId")
        if source.model and model != source.model:
            said = f"{source.version} is a version of model {model}"
            raise RequestError("source", source.shown, f"a version of CivitAI's model {source.model}", said)
    else:
        found = ask(f"models/{source.model}", f"model {source.model}")
        kind, version = _text(found.get("type")), _newest(source, _records(found.get("modelVersions")), family)
    if kind.lower() not in _ADAPTER_KINDS:
        raise RequestError("source", source.shown, "an adapter", f"CivitAI calls it {kind or 'nothing'}")
    return _civitai_file(source, version, endpoint, token)


_NUMBERS = "the number in civitai.com/models/ID is a model's, that in a download address a version's (civitai:@VERSION)"


def _newest(source: Source, versions: list[dict[str, object]], family: str) -> dict[str, object]:
    """The newest published version, of that family where one is named: CivitAI lists the newest first."""
    published = [each for each in versions if _text(each.get("status") or "Published") == "Published"]
    fitting = [each for each in published if _text(each.get("baseModel")).lower().startswith(_BASES.get(family, ("",)))]
    if not fitting:
        listed = _some([f"{each.get('id')} for {_text(each.get('baseModel'))}" for each in published])
        wanted = f" for {family}" if family else ""
        raise RunError(f"{source.shown} has no published version{wanted}; it has {listed or 'none'}")
    return fitting[0]


def _civitai_file(source: Source, version: dict[str, object], endpoint: str, token: Token | None) -> Remote:
    number = version.get("id")
    if not isinstance(number, int):
        raise RunError(f"CivitAI's answer about {source.shown} has no version in it")
    files = [each for each in _records(version.get("files")) if _text(each.get("type")) in ("Model", "Pruned Model")]
    formats = [_text(_record(each.get("metadata")).get("format")) for each in files]
    weights = [
        each
        for each, form in zip(files, formats, strict=True)
        if form == "SafeTensor" or (not form and _text(each.get("name")).lower().endswith(_WEIGHTS))
    ]
    if not weights:
        listed = ", ".join(sorted({form for form in formats if form})) or "nothing"
        said = f"{source.shown}, version {number}, has no {_WEIGHTS} file, only {listed}"
        raise RunError(f"{said}; pickles are never read")
    file = next((each for each in weights if each.get("primary") is True), weights[0])
    # The address that CivitAI gives is only believed as to which of the version's files is meant.
    query = urlsplit(_text(file.get("downloadUrl"))).query or "type=Model&format=SafeTensor"
    digest, kilobytes = _text(_record(file.get("hashes")).get("SHA256")).lower(), file.get("sizeKB")
    words = version.get("trainedWords")
    facts = {
        "file": shown_name(_text(file.get("name"))),
        "base model": _text(version.get("baseModel")),
        "trained words": ", ".join(_text(word) for word in words[:20]) if isinstance(words, list) else "",
        "early access until": _text(version.get("earlyAccessEndsAt")),
    }
    return Remote(
        url=f"{endpoint}/api/download/models/{number}?{quote(query, safe='=&%')}",
        name=facts["file"],
        token=token,
        revision=str(number),
        about=int(min(kilobytes, 1e12) * 1024) if isinstance(kilobytes, int | float) and kilobytes > 0 else 0,
        sha256=digest if len(digest) == 64 else "",
        login=_login("civitai_token"),
        facts={name: _line(fact) for name, fact in facts.items() if fact},
    )


def _line(text: str) -> str:
    return "".join(mark for mark in text if mark.isprintable())[:500]


def _record(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _records(value: object) -> list[dict[str, object]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
