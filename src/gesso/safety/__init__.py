"""Safety: whether a finished picture may be seen, and what becomes of one that may not. Light names only; the plan:

decisions   what a checker is asked and answers; which of two modes is stricter
hiding      the blur that leaves nothing to recognise
concepts    a checker by nearness to concepts: StableDiffusionSafetyChecker of diffusers
labels      a checker by labels: classifiers of transformers
reading     a checker from a folder

Not here: when pictures are looked at and who is told (`engine/safety`), where files come from (`weights`).
"""

from gesso.safety.decisions import MODES, Checker, Decision, Mode, stricter

__all__ = ["MODES", "Checker", "Decision", "Mode", "stricter"]
