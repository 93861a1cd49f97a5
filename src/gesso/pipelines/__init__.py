"""Pipelines: one file a model family, each the six verbs of `contract`, and nothing that families share with weights."""
