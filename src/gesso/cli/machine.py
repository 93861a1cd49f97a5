"""Options that say how this machine computes, the same of every command that paints: device, dtype, memory, attention.

Here: the options, the check before any work, and the engine that is made of them. Not here: what is possible where
(`gesso.engine`), and where a value comes from (`gesso.settings`).
"""

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.memory_modes import AUTO, check_memory
from gesso.memory_modes import HELP as MEMORY_HELP
from gesso.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gesso.cli.view import View
    from gesso.engine import Engine
    from gesso.request import GenerationRequest

PANEL = "The machine"

Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; else the best there is.", rich_help_panel=PANEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16; else what suits model and device.", rich_help_panel=PANEL
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="NAME",
        help="Kernel of attention, sdpa unless set; gesso doctor lists them.",
        rich_help_panel=PANEL,
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="MODE", help=f"Memory mode: {MEMORY_HELP}", rich_help_panel=PANEL)
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the networks' blocks: minutes to begin, then faster.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


def machine_settings(flags: dict[str, object]) -> Settings:
    """The settings in force with these flags.

    Raises:
        RequestError: a name that no device, dtype or kernel has, before anything heavy is imported.
    """
    from gesso.devices import check_dtype, check_name
    from gesso.engine import attention

    settings = load_settings(flags)
    if settings.device is not None:
        check_name(settings.device)
    if settings.dtype is not None:
        check_dtype(settings.dtype)
    attention.check_name(settings.attention, settings.device)
    check_memory(settings.memory)
    return settings


def check_machine(settings: Settings) -> None:
    """Check that this machine has what the settings ask for; imports PyTorch.

    What depends on the dtype is checked again when a model is loaded, before its weights are read.

    Raises:
        RequestError: a device, a kernel or compiling that is not for this machine.
        MissingError: something installable is missing.
    """
    import torch

    from gesso.devices import check_dtype
    from gesso.engine.acceleration import Acceleration
    from gesso.engine.device import check_device, default_device

    device = check_device(settings.device or default_device())
    dtype = None if settings.dtype is None else getattr(torch, check_dtype(settings.dtype))
    Acceleration(attention=settings.attention, compile=settings.compile).check(device, dtype)


def new_engine(settings: Settings) -> "Engine":
    """An engine that computes as the settings say. What a request's `debug_shapes` logs is shown."""
    from gesso.engine import Engine

    _show_logs()
    names = ("device", "dtype", "attention", "compile", "memory")
    return Engine(**{name: getattr(settings, name) for name in names})


def _show_logs() -> None:
    """What caches log goes to standard error, a line each; a library leaves that to who uses it."""
    log = logging.getLogger("gesso.caching")
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler()]


def with_memory_mode(settings: Settings, requests: "Sequence[GenerationRequest]", view: "View") -> Settings:
    """The settings with the memory mode that requests to one model are painted in; says which, if that was open.

    Raises:
        OutOfMemoryError: what is asked for surely does not fit, or nothing that paints the same bits.
    """
    from gesso.engine.device import default_device
    from gesso.engine.loading import memory_mode

    device = settings.device or default_device()
    mode = memory_mode(requests[0].model, device, settings.dtype, settings.memory, requests)
    if settings.memory == AUTO:
        view.line(f"memory: {mode}")
    return settings.model_copy(update={"memory": str(mode)})
