"""S3-DiT, the network of Z-Image (arXiv:2511.22699), native.

`config` sizes, `packing` samples of any size as rows of tokens, `rotary` positions, `layers` what a block is made of,
`layout` where tokens of many samples lie, `transformer` the network and what it reads once a picture, `initialization`
how it starts, `cost` what it takes.
"""
