"""Infinity: bitwise visual autoregression (Han et al. 2024, arXiv:2412.04431), native.

`scales` the grids of a picture, `quantizer` bits from latents and back, `correction` the training inputs that repair
their own mistakes, `autoencoder` pixels from latents and back, `rotary` positions, `transformer` the network,
`checkpoint` the names that published files use.
"""
