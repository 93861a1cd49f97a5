"""Synthetic worlds: captioned pictures made by rule, with judges that can read them back.

In here: one package for each world. Not in here: models, training, anything that needs torch.
"""
