"""Judging models: each module is one score. `shapes` asks GenEval's six categories of the shapes world."""
