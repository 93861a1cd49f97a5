"""Golden runner: the product's numbers against recorded ones. `python -m tests.golden DIR`; see `runner`."""
