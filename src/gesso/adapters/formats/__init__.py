"""Files of adapters (LoRA, LoHa, LoKr, DoRA) in every spelling that people have, as one neutral record a module.

`classification` tells from a header what a file is; `reading` makes it deltas for loaded networks. Beneath them:
`keys` names of tensors, `families` which network they are of, `places` which of its modules, `assembly` and `deltas`
the tensors, `peft` what PEFT says of them beside the file.
"""
