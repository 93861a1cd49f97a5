"""Step caches: fewer full evaluations of a network by forecasting what its modules, blocks or trunk would say.

Four parts that know little of each other: *policy* (when to compute), *predictor* (the arithmetic), *store* (what is
kept, of whom) and *placement* (at which modules); `attach` puts them on one network, and takes them off again.
Not here: the loop, which asks for a decision before each step (`engine`), and what a request says
(`gesso.cache_settings`).
"""
