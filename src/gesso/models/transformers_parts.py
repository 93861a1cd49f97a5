"""Networks and tokenizers of transformers from a folder: strict, local files only, and of weights only safetensors.

transformers is imported by the caller, who hands over its classes. Where reading is deferred (`gesso.stored`) networks
get stand-ins for their tensors. Not here: what is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gesso import shards, stored
from gesso.devices import META
from gesso.errors import FileError, GessoError, MissingError, WeightsError
from gesso.models import components
from gesso.models.diffusers_parts import INSTALL

Made = TypeVar("Made")

_MENDED = "fetch it again"
_WHOLE = "model.safetensors"
_LEAST_TOKENS = 3  # two marks and something between them
# What reads a tokenizer that has no tokenizer.json: the module, and what it is installed by.
_READERS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def read_network(kind: Any, folder: Path, dtype: torch.dtype, *, weights: bool = True) -> nn.Module:
    """A network of transformers, strictly filled; without `weights` it has its shapes and lies on the meta device.

    Raises FileError for a folder of something else or a configuration that makes no network, WeightsError for weights
    that are incomplete, too many, damaged or of the wrong shape.

    With `weights` it may be one that another model has (`components`).
    """
    if not weights:
        return _read_network(kind, folder, dtype, weights=False)
    return components.shared(folder, kind.__name__, dtype, lambda: _read_network(kind, folder, dtype, weights=True))


def _read_network(kind: Any, folder: Path, dtype: torch.dtype, *, weights: bool) -> nn.Module:
    if not (folder / "config.json").is_file():  # transformers would take its own defaults
        raise FileError(folder, "holds no config.json", _MENDED)
    config = usable(folder, lambda: kind.config_class.from_pretrained(folder, local_files_only=True))
    named = config.architectures or [kind.__name__]
    named = named if isinstance(named, list) else [named]
    if kind.__name__ not in named:
        raise FileError(folder, f"holds {', '.join(str(name) for name in named)}, not {kind.__name__}", _MENDED)
    with torch.device(META):
        empty = usable(folder, lambda: kind(config))
    if not weights:
        return empty.to(dtype).eval().requires_grad_(False)
    state = _state(folder, dtype)
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    try:
        if state is None:
            network, loading = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
            )
        else:
            network, loading = kind.from_pretrained(None, config=config, state_dict=state, **options)
    except (GessoError, MemoryError, RuntimeError):  # the last is how torch says that memory is out
        raise
    except Exception as error:  # whatever its many readers raise for weights that are damaged
        raise WeightsError(folder, detail=f"no {kind.__name__} can be read ({reason(error)})") from error
    _refuse_misfits(folder, loading)
    if stored.is_deferred() and any(stored.stored_of(value) is None for value in network.state_dict().values()):
        with stored.at_once():  # it has made something new of stand-ins, so it needs the numbers
            return read_network(kind, folder, dtype)
    return network.eval().requires_grad_(False)


def _state(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The folder's tensors: stand-ins where reading is deferred. Else None for files called as transformers calls them,
    which it reads itself, and the tensors of others as they lie there, since it knows which stay in float32.

    Raises FileError for a folder without safetensors and for shards that contradict each other, WeightsError.
    """
    whole, index = (folder / _WHOLE).is_file(), (folder / f"{_WHOLE}.index.json").is_file()
    if whole != index and not stored.is_deferred():
        return None
    if whole and not index:  # whatever else lies there
        lying = stored.read_header(folder / _WHOLE)
    else:
        lying = shards.merged(folder, stored.read_header, pickles=False)
    if not stored.is_deferred():
        return {name: stored.read_apart(each) for name, each in lying.items()}
    return {name: stored.stand_in(each.cast_to(dtype)) for name, each in lying.items()}


def _refuse_misfits(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raise WeightsError for what transformers has filled with random numbers, or left over."""
    mismatched = sorted(
        f"{name}: {tuple(found)} where {tuple(wanted)} is wanted" for name, found, wanted in loading["mismatched_keys"]
    )
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing or unexpected or mismatched:
        raise WeightsError(folder, missing=missing, unexpected=unexpected, mismatched=mismatched)


def read_tokenizer(automatic: Any, folder: Path, files: tuple[str, ...]) -> Any:
    """The tokenizer of a folder that holds at least one of `files`, by transformers' `AutoTokenizer`.

    Raises FileError for one that is absent or damaged, MissingError without the library that reads it.
    """
    if not any((folder / name).is_file() for name in files):  # transformers would make up an empty one
        raise FileError(folder, f"holds no tokenizer ({' or '.join(files)})", _MENDED)
    try:
        return read_automatic(automatic, folder)
    except (GessoError, MemoryError):
        raise
    except Exception as error:  # whatever its many readers raise for files that are damaged
        absent = [] if (folder / "tokenizer.json").is_file() else _absent_readers()
        if absent:
            what = f"{' and '.join(absent)}, which the tokenizer in {folder} is read with,"
            raise MissingError(what, f"pip install {' '.join(absent)}") from error
        if isinstance(error, ImportError):
            raise MissingError(f"{error.name or 'a library'}, which {folder} is read with,", INSTALL) from error
        raise FileError(folder, f"holds no tokenizer that can be read ({reason(error)})", _MENDED) from error


def read_automatic(automatic: Any, folder: Path, **options: Any) -> Any:
    """What one of transformers' `Auto` classes reads from a folder; Python that the folder brings is never run.

    Raises FileError for a folder that cannot be read without it, and all that the many readers raise.
    """
    try:
        return automatic.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        problem = "is read with Python code of its own, which is never run"
        raise FileError(folder, problem, "get a model that transformers reads by itself") from error


def _absent_readers() -> list[str]:
    def absent(module: str) -> bool:
        try:
            return find_spec(module) is None
        except ModuleNotFoundError:  # of what it lies in
            return True

    return [name for module, name in _READERS.items() if absent(module)]


def check_tokenizer(tokenizer: Any, folder: Path, vocabulary: object, *, pads: bool) -> None:
    """Refuse a tokenizer whose tokens an encoder of `vocabulary` words does not know (FileError).

    `pads` where it must be able to fill prompts up to one length.
    """
    largest, length = max(tokenizer.get_vocab().values(), default=-1), tokenizer.model_max_length
    problem = ""
    if not isinstance(vocabulary, int) or largest >= vocabulary:
        problem = f"its tokens go up to {largest} where the encoder knows {vocabulary}"
    elif pads and tokenizer.pad_token is None:
        problem = "it has no pad_token"
    elif isinstance(length, bool) or not isinstance(length, int | float) or not length >= _LEAST_TOKENS:
        problem = f"its model_max_length {length} is no number of tokens"
    if problem:
        raise FileError(folder, f"holds a tokenizer that does not fit its encoder ({problem})", _MENDED)


def usable(source: Path, make: Callable[[], Made]) -> Made:
    """What is made of a configuration; whatever that raises means that it fits nothing (FileError).

    Raises MissingError for what needs a library that is not installed.
    """
    try:
        return make()
    except (GessoError, MemoryError):
        raise
    except ImportError as error:
        raise MissingError(f"{error.name or 'a library'}, which {source} is read with,", INSTALL) from error
    except Exception as error:  # from its own check, of any kind, to the layers it is made into
        raise FileError(source, f"cannot be used ({reason(error)})", _MENDED) from error


def reason(error: Exception) -> str:
    """What is wrong, in a few words: an error's first line, and the next where that only introduces it."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return first.strip() or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and reports on stderr: what is wrong with a folder is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
