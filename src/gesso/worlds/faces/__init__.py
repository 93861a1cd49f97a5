"""The faces world: portraits of cartoon people, each a vector of parameters, with captions and exact key points.

In here: the public names of the package. Not in here: any model; nothing below needs torch.
"""

from gesso.worlds.faces.batches import batch
from gesso.worlds.faces.captions import VOCABULARY, caption, full_caption
from gesso.worlds.faces.drawing import draw
from gesso.worlds.faces.identities import (
    Identity,
    differences,
    held_out_identity,
    identity,
    is_held_out,
    training_identity,
)
from gesso.worlds.faces.portraits import (
    BACKGROUNDS,
    EXPRESSIONS,
    FACINGS,
    SHIRTS,
    Portrait,
    held_out_portrait,
    key_points,
    portrait,
    portrait_of,
    training_portrait,
)

__all__ = [
    "BACKGROUNDS",
    "EXPRESSIONS",
    "FACINGS",
    "SHIRTS",
    "VOCABULARY",
    "Identity",
    "Portrait",
    "batch",
    "caption",
    "differences",
    "draw",
    "full_caption",
    "held_out_identity",
    "held_out_portrait",
    "identity",
    "is_held_out",
    "key_points",
    "portrait",
    "portrait_of",
    "training_identity",
    "training_portrait",
]
