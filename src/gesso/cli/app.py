"""The `gesso` command: its list of commands, and how every error ends.

Here: the table of commands, `main`, and how errors become one line (or one JSON object) and an exit status.
Not here: any command. A command's module is imported only when that command is run, so `gesso --help` stays fast.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

import typer

from gesso import __version__
from gesso.cli import streams
from gesso.errors import GessoError

# Command -> where it lives, and its line in `gesso --help` (a test holds it to the first line of its own docstring).
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("gesso.cli.generate:generate", "Paint pictures of prompts."),
    "compare": ("gesso.cli.compare:compare", "Paint one prompt with several models, side by side."),
    "show": ("gesso.cli.show:show", "Show the request that a picture carries."),
    "rerun": ("gesso.cli.show:rerun", "Make a picture again and say whether it is equal."),
    "plan": ("gesso.cli.plan:plan", "Say what a request would cost, without painting."),
    "calibrate": ("gesso.cli.calibrate:calibrate", "Measure what step caches of a model save and cost."),
    "models": ("gesso.cli.models:models", "List, show, pull, verify and remove models."),
    "lora": ("gesso.cli.lora:lora", "List, show, pull and remove LoRAs."),
    "train": ("gesso.cli.train:train", "Train a model by a recipe, or list the recipes."),
    "eval": ("gesso.cli.eval:evaluate", "Score a model."),
    "demo": ("gesso.cli.demo:demo", "Paint a contact sheet with the model that comes along."),
    "doctor": ("gesso.cli.doctor:doctor", "Say what this machine can do."),
    "config": ("gesso.cli.config:config", "Show every setting and where it came from."),
}

_HELP = "One engine for image-generation models. Works at once: gesso demo"
_COMPLETION = "_GESSO_COMPLETE"


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended leaves nothing half-written either
    streams.prepare()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status: 0 done, 1 failed while running, 2 unusable argument or file, 3 something installable is
        missing, 130 interrupted.
    """
    arguments = list(arguments) or ["--help"]
    as_json = "--json" in arguments
    try:
        status = build(arguments)(args=arguments, prog_name="gesso", complete_var=_COMPLETION, standalone_mode=False)
    except GessoError as error:
        _report(str(error), error.as_dict(), as_json)
        return error.exit_status
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
        _report(message, {"error": "UsageError", "message": message, "exit_status": error.exit_code}, as_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted", {"error": "CancelledError", "message": "interrupted", "exit_status": 130}, as_json)
        return 130
    except BrokenPipeError:  # the reader of stdout went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a fault of ours is told on one line too
        if os.environ.get("GESSO_DEBUG"):
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "this is a fault of gesso; GESSO_DEBUG=1 shows where"
        _report(f"{message}; {hint}", {"error": "RunError", "message": message, "exit_status": 1}, as_json)
        return 1
    return status if isinstance(status, int) else 0


def build(arguments: Sequence[str]) -> Callable[..., object]:
    """The command line with the one command in use loaded, and a line of help in place of the others."""
    app = typer.Typer(
        name="gesso",
        epilog="Exit status: 0 done, 1 failed, 2 unusable argument or file, 3 something to install, 130 interrupted.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_HELP)(_root)
    in_use = next((argument for argument in arguments if not argument.startswith("-")), "")
    for name, (home, line) in COMMANDS.items():
        if name != in_use and _COMPLETION not in os.environ:
            app.command(name, help=line)(_not_loaded)
            continue
        module, attribute = home.split(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return typer.main.get_command(app)


def _not_loaded() -> None:
    raise RuntimeError("a command that is only listed was run")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gesso {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Holds the options that stand before any command."""


def _report(message: str, parts: dict[str, object], as_json: bool) -> None:
    with suppress(OSError):  # a full standard error takes nothing away from the exit status
        typer.echo(json.dumps(parts, ensure_ascii=False) if as_json else f"error: {message}", err=True)
