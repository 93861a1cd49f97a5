"""Sizes of an S3-DiT, by the names of the official `transformer/config.json`. Not here: files."""

from __future__ import annotations

from dataclasses import dataclass

MODULATION_WIDTH = 256  # at most: a narrower network has its own width
PADDING = 32  # captions and pictures are filled up to a multiple of this many tokens


@dataclass(frozen=True, kw_only=True)
class S3DiTConfig:
    """What the network computes; the defaults are Z-Image's own. Raises ValueError for sizes that do not fit.

    `axes_dims` split a head's features among (frame, row, column); `axes_lens` are how many positions each has.
    `siglip_feat_dim` is the width of picture features, None for a network that reads none.
    """

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1536, 512, 512)

    def __post_init__(self) -> None:
        if len(self.all_patch_size) != 1 or len(self.all_f_patch_size) != 1:
            raise ValueError("all_patch_size and all_f_patch_size must have one value each")
        for name in ("in_channels", "dim", "n_layers", "n_heads", "cap_feat_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if min(*self.all_patch_size, *self.all_f_patch_size, *self.axes_lens, self.siglip_feat_dim or 1) < 1:
            raise ValueError("patch sizes, axes_lens and siglip_feat_dim must be at least 1")
        if self.n_refiner_layers < 0:
            raise ValueError("n_refiner_layers must be at least 0")
        if self.n_kv_heads != self.n_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} is not n_heads, {self.n_heads}")
        if any(width < 2 or width % 2 for width in self.axes_dims):
            raise ValueError("every one of axes_dims must be even and at least 2")
        if self.dim != self.n_heads * sum(self.axes_dims):
            raise ValueError(f"dim {self.dim} is not n_heads times the sum of axes_dims")
        if not (self.rope_theta > 0 and self.t_scale > 0 and self.norm_eps > 0):
            raise ValueError("rope_theta, t_scale and norm_eps must be above 0")

    @property
    def patch(self) -> tuple[int, int]:
        """Frames, and cells along the edge, of a patch."""
        return self.all_f_patch_size[0], self.all_patch_size[0]

    @property
    def patch_width(self) -> int:
        """Numbers in a patch."""
        frames, edge = self.patch
        return frames * edge**2 * self.in_channels

    @property
    def head_width(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward."""
        return int(self.dim / 3 * 8)

    @property
    def modulation_width(self) -> int:
        return min(self.dim, MODULATION_WIDTH)

    @property
    def latent_channels(self) -> int:
        return self.in_channels

    @property
    def text_width(self) -> int:
        return self.cap_feat_dim
