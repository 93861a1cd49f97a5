"""Z-Image goldens of whole forwards: tiny and wide networks with every stage recorded, and editing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gesso.models.s3dit.packing import caption_positions, padded, patchify, picture_positions
from gesso.models.s3dit.transformer import Company, Prompt, S3DiT, size_of
from tests.golden.comparison import Comparison
from tests.golden.side_car import BrokenGoldenError, Golden
from tests.golden.z_image_network import transformer_of

_BFLOAT16 = 0.1  # the reference normalises in bfloat16, the product in float32


def check_forwards(golden: Golden, comparison: Comparison) -> None:
    """Velocities of every case ("c0." and so on, or one without a prefix), and whatever of its stages is recorded."""
    network = transformer_of(golden)
    prefixes = sorted({name.removesuffix("x0") for name in golden.tensors if re.fullmatch(r"(c\d+\.)?x0", name)})
    if not prefixes:
        raise BrokenGoldenError("no tensor 'x0'")
    for prefix in prefixes:
        _check_case(golden, comparison, network, prefix)


def check_editing(golden: Golden, comparison: Comparison) -> None:
    """Velocities of pictures made of others, with and without features of these; each sample has prefix "b0." etc."""
    network = transformer_of(golden)
    samples = _numbered(golden, r"b(\d+)\.out", "b{}.out")
    atol = golden.tolerances.get("floats", default=5e-5)
    for leaf, with_features in (("out", True), ("out_without_siglip", False)):
        if not all(f"b{index}.{leaf}" in golden.tensors for index in range(len(samples))):
            continue
        prompts, latents = [], []
        for index in range(len(samples)):
            images = _numbered(golden, rf"b{index}\.image(\d+)", f"b{index}.image{{}}")
            features = _numbered(golden, rf"b{index}\.siglip(\d+)", f"b{index}.siglip{{}}") if with_features else []
            pieces = _numbered(golden, rf"b{index}\.cap(\d+)", f"b{index}.cap{{}}")
            prompts.append(Prompt(pieces, images[:-1], features, editing=True))
            latents.append(images[-1])
        with torch.no_grad():
            company = network.join([size_of(latent) for latent in latents], network.read(prompts))
            outputs = network(latents, golden.tensor("t"), company)
        for index, output in enumerate(outputs):
            comparison.close(f"b{index}.{leaf}", output, golden.tensor(f"b{index}.{leaf}"), atol)


def _check_case(golden: Golden, comparison: Comparison, network: S3DiT, prefix: str) -> None:
    latents = _numbered(golden, rf"{re.escape(prefix)}x(\d+)", f"{prefix}x{{}}")
    captions = _numbered(golden, rf"{re.escape(prefix)}cap(\d+)", f"{prefix}cap{{}}")
    time = golden.tensor(f"{prefix}t")
    atol = golden.tolerances.get("floats", default=5e-5)
    with Taps(network) as taps:
        company, outputs = _forward(network, latents, captions, time)
    for index, output in enumerate(outputs):
        comparison.close(f"{prefix}out{index}", output, golden.tensor(f"{prefix}out{index}"), atol)
    for index, (latent, caption) in enumerate(zip(latents, captions, strict=True)):
        _, (alone,) = _forward(network, [latent], [caption], time[index : index + 1])
        comparison.close(f"{prefix}out{index} alone", alone, golden.tensor(f"{prefix}out{index}"), atol)
    _check_packing(golden, comparison, network, prefix, latents, captions)
    _check_stages(golden, comparison, taps, company, prefix, latents, captions)
    if f"{prefix}out0_bf16" in golden.tensors:
        half = transformer_of(golden).to(torch.bfloat16)
        _, outputs = _forward(half, [latent.bfloat16() for latent in latents], captions, time)
        for index, output in enumerate(outputs):
            name = f"{prefix}out{index}_bf16"
            comparison.close(name, output, golden.tensor(name), _BFLOAT16)


def _forward(
    network: S3DiT, latents: Sequence[Tensor], captions: Sequence[Tensor], time: Tensor
) -> tuple[Company, list[Tensor]]:
    with torch.no_grad():
        contexts = network.read([Prompt([caption]) for caption in captions])
        company = network.join([size_of(latent) for latent in latents], contexts)
        return company, network(latents, time, company)


def _check_packing(
    golden: Golden,
    comparison: Comparison,
    network: S3DiT,
    prefix: str,
    latents: Sequence[Tensor],
    captions: Sequence[Tensor],
) -> None:
    """Patches, positions and padding of each sample, where they are recorded."""
    patch = network.config.patch
    for index, (latent, caption) in enumerate(zip(latents, captions, strict=True)):
        shape = Prompt([caption]).shape
        patches = patchify(latent, patch)
        positions = picture_positions(shape.starts()[0], size_of(latent), patch)
        for name, measured in (
            ("img_pos_ids", positions),
            ("cap_pos_ids", caption_positions(shape)),
            ("img_pad_mask", torch.arange(len(positions)) >= len(patches)),
            ("cap_pad_mask", torch.arange(padded(len(caption))) >= len(caption)),
        ):
            if f"{prefix}{name}{index}" in golden.tensors:
                comparison.equal(f"{prefix}{name}{index}", measured, golden.tensor(f"{prefix}{name}{index}"))
        name = f"{prefix}patches{index}"
        if name in golden.tensors:
            comparison.close(name, patches, golden.tensor(name)[: len(patches)], 0.0)


def _check_stages(
    golden: Golden,
    comparison: Comparison,
    taps: Taps,
    company: Company,
    prefix: str,
    latents: Sequence[Tensor],
    captions: Sequence[Tensor],
) -> None:
    """Outputs of modules. Recorded ones are padded, ours are not, so that each sample's real tokens are compared."""
    atol = golden.tolerances.get("floats", default=5e-5)
    pictures = [padded(len(patchify(latent, taps.patch))) for latent in latents]
    texts = [padded(len(caption)) for caption in captions]
    real = [len(patchify(latent, taps.patch)) for latent in latents]
    ours = {
        "t_embedder": taps.of("t_embedder"),
        "x_embedder": taps.of(f"all_x_embedder.{taps.key}").split(real),
        "cap_embedder": taps.of("cap_embedder").split([len(caption) for caption in captions]),
        "final_layer": taps.of(f"all_final_layer.{taps.key}").flatten(0, 1).split(real),
    }
    for name, lengths in (("noise_refiner", pictures), ("context_refiner", texts)):
        ours |= {key: _in_order(value, lengths) for key, value in taps.blocks(name)}
    whole = [sum(pair) for pair in zip(pictures, texts, strict=True)]
    ours |= {key: _in_order(value, whole) for key, value in taps.blocks("layers")}
    for name, measured in ours.items():
        recorded = golden.tensors.get(f"{prefix}tap.{name}")
        if recorded is None:
            continue
        if isinstance(measured, Tensor):
            comparison.close(f"{prefix}tap.{name}", measured, recorded, atol)
            continue
        flat = recorded.ndim == 2  # embedders see all samples in one row, each padded
        starts = [sum((texts if name == "cap_embedder" else pictures)[:index]) for index in range(len(latents))]
        for index, sample in enumerate(measured):
            rows = recorded[starts[index] :] if flat else recorded[index]
            comparison.close(f"{prefix}tap.{name} {index}", sample, rows[: len(sample)], atol)


def _in_order(rows_BnD: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Packed rows, which lie by length, as samples in their own order."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    parts = rows_BnD.flatten(0, 1).split([lengths[index] for index in order])
    return [parts[order.index(index)] for index in range(len(lengths))]


def _numbered(golden: Golden, pattern: str, template: str) -> list[Tensor]:
    """Tensors whose names differ in a number from 0 on. Raises BrokenGoldenError where one is left out."""
    count = sum(re.fullmatch(pattern, name) is not None for name in golden.tensors)
    return [golden.tensor(template.format(index)) for index in range(count)]


class Taps:
    """Remembers what every module of a network returns, the first time it is called."""

    def __init__(self, network: S3DiT) -> None:
        self._network = network
        self._kept: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.patch = network.config.patch
        self.key = f"{self.patch[1]}-{self.patch[0]}"

    def __enter__(self) -> Taps:
        for name, module in self._network.named_modules():
            self._handles.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, name: str) -> Tensor:
        return self._kept[name]

    def blocks(self, name: str) -> list[tuple[str, Tensor]]:
        """Each block of a list with its name."""
        return [(key, value) for key, value in self._kept.items() if re.fullmatch(rf"{name}\.\d+", key)]

    def _keeper(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(module: nn.Module, given: object, made: object) -> None:
            if isinstance(made, Tensor):
                self._kept.setdefault(name, made.clone())  # later modules may change it in place

        return keep
