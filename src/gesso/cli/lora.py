"""`gesso lora`: adapters that are here, and fetching them. Sources, fetching and the store are in `gesso.adapters`."""

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gesso.cli.view import View

if TYPE_CHECKING:
    from gesso.adapters.store import AdapterStore
    from gesso.adapters.store_index import Adapter
    from gesso.request import GenerationRequest

lora = typer.Typer(help="List, show, pull and remove LoRAs.", invoke_without_command=True)

_DIGITS = 12  # of a digest, in the list
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object an adapter.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="The first digits of its SHA-256, its source, or a file.")
]


@lora.callback()
def default(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the adapters that are here, or do something with one."""
    if context.invoked_subcommand is None:
        list_adapters(as_json)


@lora.command("list")
def list_adapters(as_json: JsonOption = False) -> None:
    """List the adapters that are here, one a line: digits of the SHA-256, size, day, what it is, source."""
    here = _store().adapters()
    if as_json:
        for adapter in here:
            typer.echo(_as_json(adapter))
        return
    rows = [("adapter", "size", "fetched", "what", "source"), *(_row(adapter) for adapter in here)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for *row, last in rows:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + f"  {last}")


@lora.command("show")
def show_adapter(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show all that is known of one adapter, or of a file."""
    adapter = _found(name)
    shown = _described(adapter)
    if as_json:
        typer.echo(_as_json(adapter))
        return
    for label, value in shown.items():
        for each in value if isinstance(value, list) else [value]:
            typer.echo(f"{label:<14}{each}")


@lora.command("pull")
def pull_adapters(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="owner/repo/FILE, civitai.com/models/ID, urn:air:…, https://…"),
    ],
    limit: Annotated[
        str | None,
        typer.Option("--limit", metavar="SIZE", help="Bytes that one may have, such as 6GB; else a setting."),
    ] = None,
    family: Annotated[
        str, typer.Option("--family", help="Of a CivitAI model's versions, the newest for it: sdxl, flux, z-image, ….")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Fetch LoRAs, or what has changed of them: from Hugging Face, CivitAI, Replicate, or any https address.

    Only safetensors; every size and SHA-256 that a site states is checked. Run again after an interruption, it goes on
    where it stopped. Tokens are the settings hf_token, civitai_token and replicate_token.
    """
    from gesso.adapters.sources import parse
    from gesso.adapters.store import Wishes
    from gesso.settings import load_settings

    wanted = [parse(source) for source in sources]
    most = int(load_settings({"largest_adapter": limit}).largest_adapter)
    store = _store()
    with View(silent=as_json) as view:
        for source in wanted:
            try:
                found = store.ensure(
                    source, Wishes(update=True, family=family, limit=most), watcher=_Watcher(view, source.shown)
                )
            except KeyboardInterrupt:
                view.end_bar()
                view.line(f"{source.shown}: what has come is kept; the same command goes on from there")
                raise
            view.end_bar()
            if as_json:
                typer.echo(_as_json(found.adapter, outcome=found.outcome, received=found.received))
            else:
                typer.echo(f"{source.shown}: {_OUTCOMES[found.outcome]}, {_what(found.adapter)}, {found.adapter.path}")


_OUTCOMES = {
    "local": "a file here",
    "kept": "here already, unchanged",
    "fetched": "fetched",
    "updated": "changed, fetched",
}


@lora.command("remove")
def remove_adapter(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove an adapter that was fetched. Files of your own stay."""
    from gesso.errors import RequestError
    from gesso.weights.hub import amount

    adapter = _found(name)
    if not any(adapter.path == each.path for each in _store().adapters()):
        raise RequestError("adapter", name, "one that was fetched", "it is a file of your own, and stays")
    if not yes:
        what = f"remove {adapter.path} and free {amount(adapter.size)}"
        if as_json or not sys.stdin.isatty():
            raise RequestError("remove", name, "confirmed", f"--yes would {what}")
        typer.confirm(f"{what[0].upper()}{what[1:]}?", abort=True, err=True)
    freed = _store().remove(adapter)
    if as_json:
        typer.echo(json.dumps({"sha256": adapter.sha256, "path": str(adapter.path), "freed": freed}))
    else:
        typer.echo(f"{adapter.path}: removed, {amount(freed)} freed")


def fetch_missing(request: "GenerationRequest", family: str, view: View) -> None:
    """Fetch the request's adapters that are not here, with a bar for each; the engine would do it without one.

    Raises as `AdapterStore.ensure` does.
    """
    from gesso.adapters.sources import parse
    from gesso.adapters.store import Wishes

    store = _store()
    for source in (parse(lora.source) for lora in request.lora):
        if store.glance(source, Wishes(family=family)) is None:
            try:
                store.ensure(source, Wishes(family=family), watcher=_Watcher(view, source.shown))
            finally:
                view.end_bar()


class _Watcher:
    """A fetch's progress as a bar of megabytes."""

    def __init__(self, view: View, name: str) -> None:
        self._view = view
        self._name = name

    def begin(self, total: int | None, here: int) -> None:
        if here:
            self._view.line(f"{self._name}: {here / 1e6:.0f} MB are here already")
        if total is None:
            self._view.line(f"{self._name}: its host does not say how large it is")
        else:
            self._view.begin_bar(self._name, max(round(total / 1e6), 1), "MB")

    def move(self, here: int) -> None:
        self._view.move_bar(here / 1e6)

    def wait(self) -> None:
        self._view.line(f"{self._name}: it is being fetched already; waiting for that")


def _store() -> "AdapterStore":
    from gesso.adapters.store import AdapterStore

    return AdapterStore()


def _found(name: str) -> "Adapter":
    """An adapter by its digits or source, or a file. Raises RequestError, FileError."""
    from gesso.adapters.sources import parse
    from gesso.adapters.store import checked_file
    from gesso.errors import RequestError

    try:
        return _store().find(name)
    except RequestError as error:
        if set(name.lower()) <= set("0123456789abcdef"):
            raise
        try:
            source = parse(name)
        except RequestError:
            raise error from None
    return checked_file(source.path) if source.path is not None else _store().find(source)


def _what(adapter: "Adapter") -> str:
    """What an adapter is, in a line; damaged files say so."""
    from gesso.adapters.formats.classification import classify
    from gesso.errors import GessoError

    try:
        return classify(adapter.path).summary()
    except GessoError as error:
        return f"cannot be used: {error}"


def _said(adapter: "Adapter") -> dict[str, str]:
    """What an adapter's file says of itself."""
    from gesso.adapters.formats.classification import classify
    from gesso.errors import GessoError

    try:
        return classify(adapter.path).facts()
    except GessoError:
        return {}


def _row(adapter: "Adapter") -> tuple[str, ...]:
    from gesso.weights.hub import amount

    day, source = "", ""
    if adapter.origins:
        latest = adapter.origins[0]
        day = time.strftime("%Y-%m-%d", time.localtime(latest.fetched))
        more = f", and {len(adapter.origins) - 1} more" if len(adapter.origins) > 1 else ""
        source = latest.source + more
    return adapter.sha256[:_DIGITS], amount(adapter.size), day, _what(adapter), source


def _described(adapter: "Adapter") -> dict[str, Any]:
    """What there is to say of an adapter, by label."""
    from gesso.weights.hub import amount

    sources = [
        origin.source + (f" at {origin.revision}" if origin.revision else "") + (" (private)" if origin.private else "")
        for origin in adapter.origins
    ]
    facts = _said(adapter)
    facts |= {name: fact for origin in reversed(adapter.origins) for name, fact in origin.facts.items()}
    plain = {"what": _what(adapter), "size": amount(adapter.size), "SHA-256": adapter.sha256, "path": str(adapter.path)}
    return plain | facts | ({"source": sources} if sources else {})


def _as_json(adapter: "Adapter", **more: object) -> str:
    import dataclasses

    shown = dataclasses.asdict(adapter) | {"what": _what(adapter)} | more
    return json.dumps(shown, ensure_ascii=False, default=str)
