"""S3-DiT: equal to diffusers' network in every company, without leaks, syncs or changed inputs, and it learns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gesso.models.s3dit.initialization import initialize
from gesso.models.s3dit.packing import Size
from gesso.models.s3dit.transformer import Prompt, S3DiT, size_of
from tests.unit.models.small_s3dit import (
    PICTURE_WIDTH,
    captions_of,
    drawn,
    evaluate,
    latents_of,
    small_config,
    small_s3dit,
    times_of,
)

SIZES: list[Size] = [(1, 8, 8), (1, 12, 8), (1, 8, 8), (1, 16, 20)]
LENGTHS = [7, 33, 32, 1]


@pytest.fixture(scope="module")
def network() -> S3DiT:
    return small_s3dit().requires_grad_(False)


def _rival(network: S3DiT) -> nn.Module:
    diffusers = pytest.importorskip("diffusers.models.transformers.transformer_z_image")
    rival = diffusers.ZImageTransformer2DModel(**asdict(network.config))
    rival.load_state_dict(network.state_dict(), strict=True)
    return rival.eval()


def _close(ours: list[Tensor], expected: list[Tensor], atol: float = 2e-5) -> None:
    assert [tuple(x.shape) for x in ours] == [tuple(x.shape) for x in expected]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [[0], [3], [0, 2], [0, 1, 2, 3], [3, 2, 1, 0]], ids=str)
def test_it_is_diffusers_network_in_any_company(network: S3DiT, chosen: list[int]) -> None:
    sizes, lengths = [SIZES[index] for index in chosen], [LENGTHS[index] for index in chosen]
    latents, captions, times = latents_of(*sizes), captions_of(*lengths), times_of(len(chosen))
    ours = evaluate(network, latents, [Prompt([caption]) for caption in captions], times)
    _close(ours, _rival(network)(latents, times, captions, return_dict=False)[0])


@torch.no_grad()
def test_editing_is_diffusers_too(network: S3DiT) -> None:
    """Two conditions of other sizes than the target; another sample with one; with features and without."""
    rival = _rival(network)
    conditions = [latents_of((1, 8, 12), (1, 6, 6)), latents_of((1, 4, 4))]
    targets = latents_of((1, 12, 8), (1, 8, 8))
    captions = [captions_of(5, 40, 9, 3), captions_of(33, 2, 6)]
    grids = [[drawn(3, 5, PICTURE_WIDTH), drawn(1, 4, PICTURE_WIDTH, seed=1)], [drawn(6, 6, PICTURE_WIDTH, seed=2)]]
    images = [[*condition, target] for condition, target in zip(conditions, targets, strict=True)]
    masks = [[0, 0, 1], [0, 1]]
    for features in (grids, None):
        prompts = [
            Prompt(captions[index], conditions[index], features[index] if features else [], editing=True)
            for index in range(2)
        ]
        given: list[Any] = [[*each, None] for each in features] if features else [None, None]
        ours = evaluate(network, targets, prompts, times_of(2))
        expected = rival(images, times_of(2), captions, siglip_feats=given, image_noise_mask=masks, return_dict=False)[
            0
        ]
        _close(ours, expected)
        alone = evaluate(network, targets[1:], prompts[1:], times_of(2)[1:])
        _close(alone, expected[1:])


@torch.no_grad()
def test_editing_and_painting_share_a_forward(network: S3DiT) -> None:
    edit = Prompt(captions_of(5, 6, 7), latents_of((1, 8, 8)), editing=True)
    blank = Prompt(captions_of(9), editing=True)
    plain = Prompt(captions_of(9))
    latents, times = latents_of((1, 8, 8), (1, 8, 4), (1, 8, 4)), times_of(3)
    together = evaluate(network, latents, [edit, blank, plain], times)
    for index, prompt in enumerate((edit, blank, plain)):
        _close(evaluate(network, [latents[index]], [prompt], times[index : index + 1]), [together[index]])
    assert not torch.allclose(
        evaluate(network, latents[2:], [blank], times[2:])[0], together[2]
    )  # its picture stands elsewhere


@torch.no_grad()
def test_one_picture_with_two_prompts(network: S3DiT) -> None:
    """As guidance has it. What both see alike is refined once; what they see otherwise, twice."""
    latents, times = latents_of((1, 8, 8), (1, 8, 4)), times_of(2)
    prompts = [Prompt([caption]) for caption in captions_of(7, 9, 20, 40)]
    contexts = network.read(prompts)
    company = network.join([size_of(latent) for latent in latents], contexts, [0, 1, 0, 1])
    # The first's captions are as long with padding, the second's are not.
    assert sum(samples for samples, _ in company.layout.pictures.groups) == 3
    together = network(latents, times, company)
    for index, image in enumerate((0, 1, 0, 1)):
        _close(evaluate(network, [latents[image]], [prompts[index]], times[image : image + 1]), [together[index]])


@torch.no_grad()
def test_nothing_leaks_between_samples(network: S3DiT) -> None:
    """Not even infinities: another's latent, time or caption is never multiplied with one's own."""
    latents, captions, times = latents_of(*SIZES), captions_of(*LENGTHS), times_of(4)
    calm = evaluate(network, latents, [Prompt([caption]) for caption in captions], times)
    latents[1] = torch.full_like(latents[1], torch.inf)
    captions[1] = torch.full_like(captions[1], torch.nan)
    wild = evaluate(network, latents, [Prompt([caption]) for caption in captions], times)
    _close([wild[0], *wild[2:]], [calm[0], *calm[2:]], atol=0)
    assert not wild[1].isfinite().any()


@torch.no_grad()
def test_equal_samples_are_a_plain_batch(network: S3DiT) -> None:
    contexts = network.read([Prompt([caption]) for caption in captions_of(3, 30, 17)])
    layout = network.join([(1, 8, 8)] * 3, contexts).layout
    assert layout.whole.groups == ((3, 64),)
    assert tuple(layout.whole.source_Bn.shape) == (3, 64)
    assert layout.whole.time_B1 is not None and tuple(layout.whole.time_B1.shape) == (3, 1)


@torch.no_grad()
def test_prompts_read_together_as_alone(network: S3DiT) -> None:
    prompts = [Prompt([caption]) for caption in captions_of(40, 3, 33, 5)]
    for context, prompt in zip(network.read(prompts), prompts, strict=True):
        (alone,) = network.read([prompt])
        assert context.shape == alone.shape
        torch.testing.assert_close(context.tokens_ND, alone.tokens_ND, atol=1e-5, rtol=0)


def test_gradients_reach_everything_and_values_do_not_depend_on_them() -> None:
    """In place where nothing is differentiated, and the same numbers."""
    network = small_s3dit()
    edit = Prompt(captions_of(5, 6, 7), latents_of((1, 8, 8)), [drawn(2, 3, PICTURE_WIDTH)], editing=True)
    prompts, latents = [edit, Prompt(captions_of(9))], latents_of((1, 6, 6), (1, 8, 8))
    outputs = evaluate(network, latents, prompts, times_of(2))
    with torch.no_grad():
        _close(evaluate(network, latents, prompts, times_of(2)), outputs, atol=1e-5)
    sum(output.square().mean() for output in outputs).backward()  # pyright: ignore[reportAttributeAccessIssue]
    idle = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert idle == []


@torch.no_grad()
def test_what_goes_in_stays_as_it_is(network: S3DiT) -> None:
    """Blocks may be wrapped by what compares their input and output; steps read the same company again."""
    latents, times = latents_of((1, 8, 8), (1, 8, 4)), times_of(2)
    contexts = network.read([Prompt([caption]) for caption in captions_of(7, 40)])
    company = network.join([size_of(latent) for latent in latents], contexts)
    kept = [latent.clone() for latent in latents]
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[0].clone())))
        for block in (*network.noise_refiner, *network.layers)
    ]
    first = network(latents, times, company)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    assert all(torch.equal(given, before) for given, before in seen)
    assert all(torch.equal(latent, before) for latent, before in zip(latents, kept, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(network(latents, times, company), first, strict=True))


class _NoLooking(TorchDispatchMode):
    """Refuses whatever reads a number on the host or makes a shape of numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_forward_looks_at_no_number(network: S3DiT) -> None:
    latents, times = latents_of((1, 8, 8), (1, 8, 4)), times_of(2)
    contexts = network.read([Prompt([caption]) for caption in captions_of(7, 40)])
    company = network.join([size_of(latent) for latent in latents], contexts)
    with _NoLooking():
        network(latents, times, company)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(1, 8, 8)], [(1, 8, 8), (1, 8, 4)]], ids=["one", "unequal"])
def test_it_compiles_in_one_piece(network: S3DiT, sizes: list[Size]) -> None:
    latents, times = latents_of(*sizes), times_of(len(sizes))
    contexts = network.read([Prompt([caption]) for caption in captions_of(*[7, 40][: len(sizes)])])
    company = network.join(sizes, contexts)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    _close(compiled(latents, times, company), network(latents, times, company))
    torch.compiler.reset()


@torch.no_grad()
def test_in_half_precision(network: S3DiT) -> None:
    half = small_s3dit().requires_grad_(False).to(torch.bfloat16)
    latents, times = latents_of((1, 8, 8), (1, 8, 4)), times_of(2)
    prompts = [Prompt([caption]) for caption in captions_of(7, 40)]
    outputs = evaluate(half, [latent.bfloat16() for latent in latents], prompts, times)
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    for output, expected in zip(outputs, evaluate(network, latents, prompts, times), strict=True):
        torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_frames_and_other_patches() -> None:
    network = small_s3dit(all_patch_size=(1,), all_f_patch_size=(2,)).requires_grad_(False)
    latents, captions = latents_of((4, 3, 5), (2, 6, 5)), captions_of(4, 5)
    ours = evaluate(network, latents, [Prompt([caption]) for caption in captions], times_of(2))
    rival = _rival(network)
    _close(ours, rival(latents, times_of(2), captions, patch_size=1, f_patch_size=2, return_dict=False)[0])


@torch.no_grad()
def test_without_norms_of_queries_and_keys() -> None:
    network = small_s3dit(qk_norm=False, siglip_feat_dim=None).requires_grad_(False)
    assert not any("norm_q" in name or "siglip" in name for name in network.state_dict())
    latents, captions = latents_of((1, 8, 8)), captions_of(4)
    ours = evaluate(network, latents, [Prompt([caption]) for caption in captions], times_of(1))
    _close(ours, _rival(network)(latents, times_of(1), captions, return_dict=False)[0])


@torch.no_grad()
def test_it_starts_as_nothing() -> None:
    torch.manual_seed(0)
    network = S3DiT(small_config())
    initialize(network)
    outputs = evaluate(network, latents_of((1, 8, 8)), [Prompt(captions_of(5))], times_of(1))
    assert not outputs[0].any()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


@torch.no_grad()
def test_what_does_not_fit_is_refused(network: S3DiT) -> None:
    contexts = network.read([Prompt(captions_of(5))])
    with pytest.raises(ValueError, match="does not divide"):
        network.join([(1, 7, 8)], contexts)
    with pytest.raises(ValueError, match="beyond the network's 64 positions"):
        network.join([(1, 8, 130)], contexts)
    with pytest.raises(ValueError, match="at least one token"):
        network.read([Prompt([drawn(0, 10)])])
    with pytest.raises(ValueError, match="are for editing"):
        network.read([Prompt(captions_of(5, 6))])
    with pytest.raises(ValueError, match="need a piece of the caption each"):
        network.read([Prompt(captions_of(5), latents_of((1, 8, 8)), editing=True)])
    grids = [drawn(2, 2, PICTURE_WIDTH)] * 2
    with pytest.raises(ValueError, match="2 grids of features for 1 conditions"):
        network.read([Prompt(captions_of(5, 6, 7), latents_of((1, 8, 8)), grids, editing=True)])
    unseeing = small_s3dit(siglip_feat_dim=None)
    with pytest.raises(ValueError, match="reads no features"):
        unseeing.read([Prompt(captions_of(5, 6, 7), latents_of((1, 8, 8)), [drawn(2, 2, 6)], editing=True)])
    for switches in (
        {"n_kv_heads": 1},
        {"axes_dims": (4, 6, 4)},
        {"axes_dims": (3, 7, 6)},
        {"all_patch_size": (2, 4)},
        {"dim": 0},
        {"axes_lens": (512, 0, 64)},
        {"n_refiner_layers": -1},
        {"norm_eps": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(switches))):
            small_config(**switches)
