"""Checkpoints: finding, downloading, reading and checking them, and mapping their tensors to the stages.

- `hub` finds the files and downloads them.
- `tensors` reads weight files safely.
- `weight_map` says which tensors each parameter is made from, `operations` how.
- `fill` gives a stage its parameters.
- `formats` lists the parts of a checkpoint and their classes.
- `folder` loads and saves a stage, or all parts.
"""
