"""How well a checkpoint edits sounds: the tasks of `scripts/evaluate_editing`.

judges.py       figures of an edited sound beside its source, by signal processing
cases.py        sources, prompts and seeds
methods.py      what is measured: no editing, text alone, and each feature of the pipeline
tasks.py        the tasks: cases, methods with their settings, and what is right
running.py      chooses settings on some cases, and measures them on others
table.py        the results in Markdown
"""
