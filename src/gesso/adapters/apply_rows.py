"""Which state each row of a layer's input belongs to, where the states of a batch have different adapters.

Rows lie along the first axis, one for each sample that the pipeline evaluates: as it names them (`sampling.guidance`),
else one for each state in order, as often over as there are rows (the negatives of all, then the prompts of all). In
S3-DiT tokens of all samples may lie in one row; there the network's own layout says whose they are.
Not here: what rows add (`apply_layer`).
Shapes: S states, B rows, n tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gesso.errors import RunError
from gesso.models.infinity.transformer import InfinityTransformer
from gesso.models.s3dit.packing import token_count
from gesso.models.s3dit.transformer import S3DiT, size_of
from gesso.sampling.guidance import running_samples

_READ_BY_INFINITY = re.compile(r"(pool|text_projection)\..+|(head_)?modulation|.+\.cross_attention\.key_value")


class RowsOfCall(Protocol):
    """Says whose rows are whose in the call that a network is making."""

    def attach(self, network: nn.Module) -> Callable[[], None]:
        """Learn of every call of the network; what is returned ends that."""
        ...

    def states(self, name: str, x: Tensor) -> Tensor:
        """The state of each row of a module's input: `[B]`, or with more axes that go with the input's, `[B,n]`.

        Raises RunError where rows cannot be told apart.
        """
        ...

    def samples(self, name: str, x: Tensor) -> tuple[int, ...] | None:
        """The same as plain numbers where each row is a sample; None where samples may share a row."""
        ...


def rows_of(role: str, network: nn.Module, states: int) -> RowsOfCall:
    """The rule for a network in its role."""
    if isinstance(network, S3DiT):
        return _PackedRows(states)
    if role.startswith("text_encoder"):
        return _SampleRows(states, re.compile(".*"))
    return _SampleRows(states, _READ_BY_INFINITY if isinstance(network, InfinityTransformer) else None)


def reads_prompts(network: nn.Module) -> bool:
    """Whether a network has layers of its own that only read prompts, apart from its steps."""
    return isinstance(network, S3DiT | InfinityTransformer)


class _SampleRows:
    """Samples lie along the first axis, but in modules of those names that only read prompts."""

    def __init__(self, states: int, reading: re.Pattern[str] | None) -> None:
        self._states = states
        self._reading = reading
        self._known: dict[object, Tensor] = {}

    def attach(self, network: nn.Module) -> Callable[[], None]:
        del network
        return lambda: None

    def states(self, name: str, x: Tensor) -> Tensor:
        samples = self.samples(name, x)
        known = self._known.get((samples, x.device))
        if known is None:
            known = self._known[samples, x.device] = torch.tensor(samples).to(x.device)
        return known

    def samples(self, name: str, x: Tensor) -> tuple[int, ...]:
        if self._reading is not None and self._reading.fullmatch(name):
            raise _read_apart(name)
        return self._whose(name, tuple(state for state, _ in running_samples(self._states)), len(x))

    def _whose(self, name: str, samples: tuple[int, ...], rows: int) -> tuple[int, ...]:
        if rows == len(samples):
            return samples
        if samples == tuple(range(self._states)) and rows % self._states == 0:
            return samples * (rows // self._states)
        named = f"a pipeline that names {len(samples)} samples"
        raise RunError(f"{name} was given {rows} rows by {named}; adapters cannot be mixed there")


def _read_apart(name: str) -> RunError:
    return RunError(f"{name} reads prompts; those of different adapters have to be read one after the other")


class _PackedRows:
    """Tokens lie where S3-DiT's layout has put them; a token's row of the time table is the number of its image."""

    def __init__(self, states: int) -> None:
        self._states = states
        self._known: dict[str, Tensor] = {}

    def attach(self, network: nn.Module) -> Callable[[], None]:
        handles = [
            network.register_forward_pre_hook(self._begin, with_kwargs=True),
            network.register_forward_hook(self._end, always_call=True),
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()
            self._known = {}

        return detach

    def states(self, name: str, x: Tensor) -> Tensor:
        stage = name.partition(".")[0]
        place = "times" if "adaLN_modulation" in name else stage
        if place not in self._known:
            raise _read_apart(name)
        known = self._known[place]
        if known.device != x.device:
            known = self._known[place] = known.to(x.device)
        return known

    def samples(self, name: str, x: Tensor) -> None:
        del name, x

    def _begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(network, S3DiT)
        named = dict(zip(("latents", "time_I", "company"), args, strict=False)) | kwargs
        latents, layout = named["latents"], named["company"].layout
        if layout.clean or len(latents) != self._states:
            raise RunError(
                f"{len(latents)} images, some edited, cannot be told apart for {self._states} states' adapters"
            )
        counts = [token_count(size_of(latent_CFhw), network.config.patch) for latent_CFhw in latents]
        images_S = torch.arange(self._states)
        self._known = {
            "times": images_S,
            "t_embedder": images_S,
            "all_x_embedder": images_S.repeat_interleave(torch.tensor(counts)),
            "noise_refiner": layout.pictures.time_B1,
            "layers": layout.whole.time_B1,
            "all_final_layer": layout.target_time_B1,
        }

    def _end(self, *_: object) -> None:
        self._known = {}
