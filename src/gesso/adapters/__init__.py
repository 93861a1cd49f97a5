"""Adapters: low-rank changes to a network that a request may ask for, several at once, without loading it anew.

`formats` reads files of any trainer; `apply` puts adapters onto networks for the rows of a batch, and takes them off.
"""
