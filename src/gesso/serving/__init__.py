"""Serving: what other people's servers and clients say, put into requests of the engine, and back.

`flux_compatible` is the schema of FLUX-compatible predictors; `predictor` answers it with one engine.
"""
