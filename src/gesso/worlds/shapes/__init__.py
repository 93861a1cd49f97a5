"""The shapes world: coloured shapes on plain backgrounds, with captions, an exact detector and GenEval's categories.

In here: the public names of the package. Not in here: any model; nothing below needs torch.
"""

from gesso.worlds.dice import Dice
from gesso.worlds.shapes.batches import batch
from gesso.worlds.shapes.captions import VOCABULARY, Claim, caption, phrase, stated, words
from gesso.worlds.shapes.detector import Detection, Found, detect
from gesso.worlds.shapes.drawing import PALETTE, draw
from gesso.worlds.shapes.scenes import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    combinations,
    held_out_scene,
    is_held_out,
    scene,
    training_scene,
)
from gesso.worlds.shapes.scoring import Question, Verdict, judge, judge_detection, prompts, score

__all__ = [
    "CATEGORIES",
    "COLOURS",
    "PALETTE",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "VOCABULARY",
    "Claim",
    "Detection",
    "Dice",
    "Found",
    "Question",
    "Scene",
    "Thing",
    "Verdict",
    "batch",
    "caption",
    "combinations",
    "detect",
    "draw",
    "held_out_scene",
    "is_held_out",
    "judge",
    "judge_detection",
    "phrase",
    "prompts",
    "scene",
    "score",
    "stated",
    "training_scene",
    "words",
]
