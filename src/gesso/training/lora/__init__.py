"""Training a LoRA of a model that is here, on pictures and captions of the user's own. Each step of it has a file.

`settings` are the recipe's; `data` finds pictures and captions, of which `material` makes latents and text features;
`layers` is what is trained, `objectives` what it learns, by family; `task` puts them together for the loop, and `file`
is what comes out.
"""
