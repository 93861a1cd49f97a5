"""Pipelines: one file a model family, each the six verbs of `contract`; each is handed its components."""
