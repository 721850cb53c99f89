"""Checkpoints: finding one (Hub or folder), reading and checking it, and mapping its tensors into the stages.

`hub` finds the files, `tensors` reads them, `weight_map` says which tensor goes where, `stage` builds and
saves a stage with them. None of it knows what a stage computes: it reads a config, a map and a class.
"""
