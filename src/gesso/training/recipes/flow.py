"""Recipes of flow matching on the shapes world: the autoencoder, and the nano FLUX and Z-Image that share it."""

from __future__ import annotations

from dataclasses import fields, replace

from gesso.models.flux_network import FluxConfig
from gesso.models.kl_autoencoder import KLAutoencoderConfig
from gesso.models.s3dit.config import S3DiTConfig
from gesso.sampling.flow import EULER, STOCHASTIC
from gesso.training.flow import FlowSettings, FlowTask
from gesso.training.flow_networks import NetworkConfig
from gesso.training.flow_on_policy import FlowOnPolicySettings, FlowOnPolicyTask
from gesso.training.kl_autoencoder import KLAutoencoderSettings, KLAutoencoderTask
from gesso.training.loop import LoopSettings
from gesso.training.recipes.recipe import Recipe

LATENT_CHANNELS = 8
SIDE = 64


def shapes_autoencoder() -> Recipe:
    """8 channels at stride 4, 64 pixels, 0.7 million parameters; about 20 minutes on two cores."""
    return Recipe(
        name="shapes-autoencoder",
        make=KLAutoencoderTask,
        settings=KLAutoencoderSettings(
            network=KLAutoencoderConfig(latent_channels=LATENT_CHANNELS, widths=(16, 32, 64), groups=4), side=SIDE
        ),
        loop=LoopSettings(steps=5000, batch=32, learning_rate=2e-3, warmup=50, clip=1.0, average_decay=0.998),
    )


def flux_nano() -> Recipe:
    """FLUX on 64 tokens of pictures and 32 of text: 2.7 million parameters, 64 pixels; about an hour on two cores.

    Narrow and deep: nine blocks of width 128 take half as long again as five of 160, which have as many parameters.
    """
    network = FluxConfig(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    )
    return _nano("flux-nano", network, ("guidance", 5.0))


def z_image_nano() -> Recipe:
    """S3-DiT on as many tokens, with as many parameters; about an hour on two cores.

    Its guidance of 2 is what others call 3. Euler's method carries to the end what an early step left half decided:
    with fresh noise in every step 0.618 of 600 questions are answered right, where 0.530 were.
    """
    network = S3DiTConfig(
        in_channels=LATENT_CHANNELS,
        dim=128,
        n_heads=4,
        n_kv_heads=4,
        n_refiner_layers=1,
        n_layers=7,
        cap_feat_dim=128,
        axes_dims=(8, 12, 12),
        axes_lens=(512, 128, 128),
    )
    return _nano("z-image-nano", network, ("guidance", 2.0), ("scheduler", STOCHASTIC))


def flux_nano_on_policy() -> Recipe:
    """`flux_nano` goes on where its own pictures lead it; fifty minutes on two cores, 1 GB of memory and disk.

    FLUX gives words no positions: what belongs to what must be in their features, so the word encoder learns too.
    """
    return _on_policy(
        flux_nano(),
        "flux-nano-on-policy",
        guidances=(0.0, 2.0, 3.0),
        schedulers=(STOCHASTIC, STOCHASTIC, EULER),
        guidance=2.5,
        steps=4320,
        train_text=True,
    )


def z_image_nano_on_policy() -> Recipe:
    """`z_image_nano` goes on where its own pictures lead it; three quarters of an hour on two cores, 1 GB as well."""
    return _on_policy(z_image_nano(), "z-image-nano-on-policy", guidances=(0.0, 1.2, 2.0), guidance=1.2)


def _on_policy(
    base: Recipe,
    name: str,
    *,
    guidances: tuple[float, ...],
    guidance: float,
    schedulers: tuple[str, ...] = (),
    steps: int = 3300,
    train_text: bool = False,
) -> Recipe:
    """What they have in common."""
    assert isinstance(base.settings, FlowSettings)
    given = {field.name: getattr(base.settings, field.name) for field in fields(base.settings)}
    given |= {"start_from": f"runs/{base.name}/export", "precompute": 0, "guidances": guidances}
    given |= {"schedulers": schedulers, "train_text": train_text}
    # Steps without fresh noise carry a mixture to the end, also where the network has learned better.
    given["generation"] = (("steps", 20), ("guidance", guidance), ("scheduler", STOCHASTIC))
    loop = replace(base.loop, steps=steps, batch=36, learning_rate=1.2e-3, warmup=50, average_decay=0.998)
    return Recipe(
        name=name,
        make=FlowOnPolicyTask,
        settings=FlowOnPolicySettings(**given),
        loop=replace(loop, evaluate_every=steps // 4, checkpoint_every=240),
    )


def _nano(name: str, network: NetworkConfig, *generation: tuple[str, object]) -> Recipe:
    """What the nano flow models have in common."""
    return Recipe(
        name=name,
        make=FlowTask,
        settings=FlowSettings(
            network=network,
            autoencoder="runs/shapes-autoencoder/export",
            side=SIDE,
            precompute=131_072,
            # Flat colours lie plain under much noise: what is still open is settled while sigma is above 0.7.
            time_shift=4.0,
            sampling_shift=4.0,
            score_prompts=60,
            generation=(("steps", 20), *generation),
        ),
        loop=LoopSettings(
            steps=11_000,
            batch=64,
            learning_rate=2e-3,
            warmup=200,
            average_decay=0.999,
            compile=True,
            attention=("MATH",),
            evaluate_every=1000,
        ),
    )
