"""Where an adapter comes from: the words that people write, read into one frozen record. Nothing is looked up.

    owner/repo[@revision][/file]                     Hugging Face; also hf://…, hf.co/…, and its pages' addresses
    civitai.com/models/ID[?modelVersionId=VERSION]   CivitAI; also civitai:ID[@VERSION], and its download addresses
    urn:air:ECOSYSTEM:lora:civitai:ID[@VERSION]      the same as CivitAI writes it; also …:huggingface:owner/repo
    replicate.com/owner/model[/VERSION]              Replicate; also replicate:owner/model[@VERSION][/file.safetensors]
    https://host/path[#file]                         any other address; the file is one in an archive
    infinite-you:realism, infinite-you:anti-blur     those that InfiniteYou's authors lay beside it, on Hugging Face
    ./file.safetensors, /path, ~/path, file://path   a file of this machine

A scale is written behind any of them: SOURCE::0.8. What could be two things is one of them by rule, whatever lies on
the disk: two words with a slash are Hugging Face's; a path begins with "./", "../", "/" or "~", or is a name, or a
folder and a name, that ends in .safetensors. Not here: asking a site what lies there (`sources_sites`), fetching
(`sources_download`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from gesso.errors import RequestError
from gesso.network import shown as shown_url
from gesso.request_parts import LARGEST_LORA_SCALE

Site = Literal["huggingface", "civitai", "replicate", "url", "file"]

FORMS = (
    "owner/repo[@revision][/file] of Hugging Face, civitai.com/models/ID, urn:air:…, replicate.com/owner/model, "
    "https://…, or a file such as ./my.safetensors"
)
_LONGEST = 4096  # characters

_SCALE = re.compile(r"[+-]?(\d{1,9}\.?\d{0,20}|\.\d{1,20})([eE][+-]?\d{1,3})?")
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_REPOSITORY = rf"(?P<repository>{_WORD}/{_WORD})"
_FILE = r"(/(?P<file>.+))?"
_HUB = re.compile(rf"{_REPOSITORY}(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?{_FILE}", re.DOTALL)
_REPLICATE = re.compile(rf"{_REPOSITORY}([@:](?P<revision>[A-Za-z0-9]{{1,128}}))?{_FILE}", re.DOTALL)
_CIVITAI = re.compile(r"(?P<model>[0-9]{1,18})?(@(?P<version>[0-9]{1,18}))?")
_AIR = re.compile(
    r"urn:air:((?P<ecosystem>[A-Za-z0-9_./-]+):)?(?P<type>[A-Za-z0-9_-]+):(?P<site>[A-Za-z0-9_-]+):(?P<id>[^@:]+)"
    r"(@(?P<version>[^:]+?))?(:[^:]*)?",
    re.DOTALL,
)
_AIR_TYPES = ("lora", "lycoris", "locon", "dora")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_CIVITAI_HOSTS = tuple(f"{www}civitai.{end}" for www in ("", "www.") for end in ("com", "red", "green"))
_CIVITAI_FORM = "write civitai.com/models/ID?modelVersionId=VERSION, or civitai:ID@VERSION"
_REPLICATE_HOSTS = ("replicate.com", "www.replicate.com")
_HOSTS = (*_HUB_HOSTS, *_CIVITAI_HOSTS, *_REPLICATE_HOSTS)
_OTHER_KINDS = ("datasets", "spaces", "collections", "papers", "docs", "api")
_INFINITE_YOU = {
    name: f"ByteDance/InfiniteYou/supports/optional_loras/flux_{name.replace('-', '_')}_lora.safetensors"
    for name in ("realism", "anti-blur")
}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WEIGHTS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an adapter comes from, and how strongly it is meant where that was written.

    `repository` is "owner/name" of Hugging Face or Replicate, `revision` a branch, tag, commit or version of it, `file`
    one in it or in an archive; `model` and `version` are CivitAI's numbers; `url` and `path` are for the other two.
    """

    site: Site
    repository: str = ""
    revision: str = ""
    file: str = ""
    model: int = 0
    version: int = 0
    url: str = field(default="", repr=False)  # may have a secret in its query
    path: Path | None = None
    scale: float | None = None

    @property
    def shown(self) -> str:
        """How it is written for people and errors: in one spelling, without scale and secrets."""
        inner = f"/{self.file}" if self.file else ""
        revision = self.revision if self.revision.startswith("refs/") else quote(self.revision, safe="")
        at = f"@{revision}" if revision else ""
        if self.site == "huggingface":
            return f"{self.repository}{at}{inner}"
        if self.site == "replicate":
            return f"replicate:{self.repository}{at}{inner}"
        if self.site == "civitai":
            return f"civitai:{self.model or ''}{f'@{self.version}' if self.version else ''}"
        if self.site == "url":
            return shown_url(self.url) + (f"#{self.file}" if self.file else "")
        return str(self.path)

    @property
    def key(self) -> str:
        """Hexadecimal digits that are the same for every spelling of one source, whatever its scale."""
        parts = [self.site, self.repository, self.revision, self.file, str(self.model), str(self.version), self.url]
        parts.append(str(self.path.absolute()) if self.path else "")
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def parse(text: str, *, bare: Literal["huggingface", "replicate"] = "huggingface", files: bool = True) -> Source:
    """Read what somebody wrote.

    Args:
        text: a source, with a scale or without.
        bare: whose "owner/name" is without a site: Hugging Face's, but Replicate's in predictors made for it, which
            also take "owner/name/VERSION".
        files: whether files of this machine may be named; not by strangers.

    Raises:
        RequestError: it is none, names something else than an adapter, or the scale is out of range.

    Example:
        >>> parse("owner/style@v2/style.safetensors::0.8")
        Source(site='huggingface', repository='owner/style', revision='v2', file='style.safetensors', model=0, \
version=0, path=None, scale=0.8)
        >>> parse("https://civitai.com/models/12/name?modelVersionId=34").shown
        'civitai:12@34'
    """
    plain = text.strip()
    if not plain or len(plain) > _LONGEST or any(ord(mark) < 0x20 or 0xD800 <= ord(mark) < 0xE000 for mark in plain):
        raise RequestError("source", quotable(text), "a source of an adapter", f"write {FORMS}")
    plain, scale = split_scale(plain)
    found = replace(_read(plain, bare), scale=scale)
    if found.site == "file" and not files:
        raise RequestError("source", quotable(text), "allowed: files of this machine are not to be named here")
    return found


def quotable(text: str) -> str:
    """What somebody wrote as an error may quote it: short, printable, and without what may be a secret."""
    clean = "".join(mark if mark.isprintable() else " " for mark in text[:200])
    return shown_url(clean) if _SCHEME.match(clean.strip()) else clean.partition("?")[0]


def split_scale(text: str) -> tuple[str, float | None]:
    """What was written without its scale, and the scale, None where none was. Raises RequestError."""
    source, mark, written = text.rpartition("::")
    if not mark or "/" in written or "]" in written:  # the colons of an IPv6 address, or none
        return text, None
    if not source or _SCALE.fullmatch(written.strip()) is None:
        raise RequestError("scale", quotable(written), "a number, as in SOURCE::0.8")
    scale = float(written)
    if not math.isfinite(scale) or abs(scale) > LARGEST_LORA_SCALE:
        raise RequestError("scale", written, f"between {-LARGEST_LORA_SCALE:g} and {LARGEST_LORA_SCALE:g}")
    return source.strip(), scale


def _read(text: str, bare: Literal["huggingface", "replicate"]) -> Source:
    lower = text.lower()
    if text.startswith(("/", "./", "../", "~")):
        return _file(text)
    for prefix, read in _PREFIXES.items():
        if lower.startswith(prefix):
            return read(text, text[len(prefix) :])
    if lower.endswith(_WEIGHTS) and text.count("/") < 2 and lower.partition("/")[0] not in _HOSTS:
        return _file(text)  # before it is read as an address, which names with brackets are not
    address = text if _SCHEME.match(text) else f"https://{text}"
    parts = _split_url(text, address)
    host = (parts.hostname or "").lower()
    for hosts, read in ((_HUB_HOSTS, _hub_page), (_CIVITAI_HOSTS, _civitai_page), (_REPLICATE_HOSTS, _replicate_page)):
        if host in hosts and parts.scheme.lower() in ("https", "http"):
            return read(text, parts)
    if _SCHEME.match(text):
        return _url(text, parts)
    if "/" in text and "." in text.partition("/")[0]:
        raise RequestError("source", quotable(text), "a source", "write https:// before a host, or ./ before a folder")
    return _replicate(text, text) if bare == "replicate" else _in_repository(text, text, "huggingface")


_PREFIXES: dict[str, Callable[[str, str], Source]] = {
    "urn:": lambda text, rest: _air(text),
    "file:": lambda text, rest: _file(text),
    "hf:": lambda text, rest: _in_repository(text, rest, "huggingface"),
    "huggingface:": lambda text, rest: _in_repository(text, rest, "huggingface"),
    "civitai:": lambda text, rest: _civitai(text, rest),  # noqa: PLW0108  (it stands below)
    "infinite-you:": lambda text, rest: _infinite_you(text, rest),  # noqa: PLW0108
    "replicate:": lambda text, rest: _replicate(text, rest),  # noqa: PLW0108
}


def _none(text: str, what: str, hint: str = "") -> RequestError:
    return RequestError("source", quotable(text), what, hint or f"write {FORMS}")


def _split_url(text: str, address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port, parts.hostname  # both may be none
    except ValueError as error:
        raise _none(text, "an address") from error
    return parts


def _in_repository(text: str, rest: str, site: Site) -> Source:
    """owner/name[@revision][/file], with slashes around it or not."""
    found = (_HUB if site == "huggingface" else _REPLICATE).fullmatch(rest.strip("/"))
    if found is None or not _fits(found["file"] or ""):
        raise _none(text, "a source of an adapter")
    if site == "huggingface":
        _check_weights(text, found["file"] or "")
    revision = unquote(found["revision"] or "")
    return Source(site=site, repository=found["repository"], revision=revision, file=found["file"] or "")


def _fits(name: str) -> bool:
    """Whether a name stays where it is: no part that climbs, and nothing that only some systems read as a path."""
    return not any(part in ("", ".", "..") for part in name.split("/")) if name else True


def _check_weights(text: str, name: str) -> None:
    if name and not name.lower().endswith(_WEIGHTS):
        ending = Path(name).suffix or "a name without an ending"
        raise _none(text, f"a {_WEIGHTS} file", f"it is {ending}; pickles and other files are never read")


def _hub_page(text: str, parts: SplitResult) -> Source:
    """An address of Hugging Face: a repository's page, a file's page, a download, or owner/repo/file."""
    words = unquote(parts.path).strip("/").split("/")
    if words[0] in _OTHER_KINDS or len(words) < 2:
        raise _none(text, "the page of a model", "write owner/repo, or the address of the file")
    owner_and_name, rest = "/".join(words[:2]), words[2:]
    if rest and rest[0] in ("resolve", "blob", "raw", "tree"):
        raw = parts.path.strip("/").split("/")[3:]  # where a branch with a slash still has it quoted
        count = 3 if raw[:1] == ["refs"] else 1
        revision, rest = "/".join(raw[:count]), unquote("/".join(raw[count:])).split("/")
        owner_and_name += f"@{revision}" if revision else ""
    file = "/".join(rest)
    return _in_repository(text, owner_and_name + (f"/{file}" if file else ""), "huggingface")


def _civitai(text: str, rest: str) -> Source:
    found = _CIVITAI.fullmatch(rest)
    if found is None or not rest:
        raise _none(text, "a model of CivitAI", _CIVITAI_FORM)
    return Source(site="civitai", model=int(found["model"] or 0), version=int(found["version"] or 0))


def _civitai_page(text: str, parts: SplitResult) -> Source:
    """An address of CivitAI. A token in it is left out: it belongs into the settings."""
    words = parts.path.strip("/").split("/")
    versions = parse_qs(parts.query).get("modelVersionId", [""])
    if words[0] == "models" and len(words) > 1:
        return _civitai(text, words[1] + (f"@{versions[0]}" if versions[0] else ""))
    if words[:3] == ["api", "download", "models"] and len(words) == 4:
        number = words[3]
    elif words[0] == "model-versions" and len(words) == 2:
        number = words[1]
    else:
        number = ""
    if re.fullmatch(r"[0-9]{1,18}", number) is None:
        raise _none(text, "a model of CivitAI", _CIVITAI_FORM)
    return Source(site="civitai", version=int(number))


def _replicate(text: str, rest: str) -> Source:
    """owner/model[@VERSION][/file.safetensors], or owner/model[/VERSION] as in the addresses of its pages."""
    if rest.strip("/").lower().endswith(_WEIGHTS):
        return _in_repository(text, rest, "replicate")
    return _replicate_version(text, rest)


def _replicate_page(text: str, parts: SplitResult) -> Source:
    return _replicate_version(text, parts.path)


def _replicate_version(text: str, path: str) -> Source:
    """owner/model, alone or with /VERSION or /versions/VERSION behind it."""
    words = [word for word in path.strip("/").split("/") if word not in ("versions", "_weights")]
    name, version = "/".join(words[:2]), words[2:]
    if len(version) > 1:
        raise _none(
            text, "a model of Replicate", "write replicate.com/owner/model or replicate.com/owner/model/VERSION"
        )
    return _in_repository(text, "@".join([name, *version]), "replicate")


def _air(text: str) -> Source:
    """urn:air:…, whose version ends where a layer (":") or a format (".safetensors") begins."""
    found = _AIR.fullmatch(text)
    if found is None:
        raise _none(text, "a urn:air:…", "write urn:air:sdxl:lora:civitai:ID@VERSION")
    if found["type"].lower() not in _AIR_TYPES:
        raise _none(text, "a LoRA", f"it says {found['type']}; wanted is {', '.join(_AIR_TYPES)}")
    version = found["version"] or ""
    site = found["site"].lower()
    if site == "civitai":
        return _civitai(text, found["id"] + (f"@{version.partition('.')[0]}" if version else ""))
    if site == "huggingface":
        return _in_repository(text, found["id"] + (f"@{version}" if version else ""), "huggingface")
    raise _none(text, "of a site that is known", "civitai or huggingface")


def _infinite_you(text: str, name: str) -> Source:
    if name not in _INFINITE_YOU:
        raise _none(
            text, "one of InfiniteYou's", f"write {' or '.join(f'infinite-you:{each}' for each in _INFINITE_YOU)}"
        )
    return _in_repository(text, _INFINITE_YOU[name], "huggingface")


def _file(text: str) -> Source:
    if text.lower().startswith("file:"):
        parts = _split_url(text, text)
        if parts.netloc not in ("", "localhost"):
            raise _none(text, "a file of this machine", "write file:///path")
        text = unquote(parts.path)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise _none(text, "a path") from error
    if not path.name or "\0" in text:
        raise _none(text, "a file")
    return Source(site="file", path=path)


def _url(text: str, parts: SplitResult) -> Source:
    if parts.scheme.lower() not in ("https", "http"):
        raise _none(text, "an https address", f"{parts.scheme}:// is not read")
    if not parts.hostname or any(mark.isspace() or mark == "\\" for mark in text):
        raise _none(text, "an address")
    if "@" in parts.netloc:
        raise _none(text, "an address without an account", "leave out what stands before the @")
    file = unquote(parts.fragment)
    if not _fits(file):
        raise _none(text, "an address of a file in an archive")
    return Source(site="url", url=parts._replace(fragment="").geturl(), file=file)
