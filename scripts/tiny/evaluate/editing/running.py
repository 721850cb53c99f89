"""Chooses each method's setting on some cases, and measures it on others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.tiny.evaluate.editing.cases import Case, draw_cases
from scripts.tiny.evaluate.editing.methods import Method, Model, Setting, Sounds
from scripts.tiny.evaluate.editing.tasks import Checks, Task

BATCH = 8  # sounds at once, at most


@dataclass(frozen=True)
class Score:
    """How a method did with a setting.

    Attributes:
        right: share of the sounds that pass every check.
        figure: the task's, the mean of the finite ones.
        missed: how often each check failed.
    """

    right: float
    figure: float
    missed: dict[str, int]


@dataclass(frozen=True)
class Row:
    """A method's scores.

    Attributes:
        name: of the method.
        setting: the one that was chosen.
        score: on the cases that are reported.
        grid: settings and scores on the cases on which the setting was chosen; empty if there is one setting.
    """

    name: str
    setting: Setting
    score: Score
    grid: list[tuple[Setting, Score]]


def equal_lengths(model: Model, cases: Sequence[Case], size: int = BATCH) -> Iterator[list[int]]:
    """The indices of the cases in batches of texts with equally many tokens, which need no padding."""
    tokenize = model.pipe.tokenizer_2
    lengths = [
        tuple(
            len(tokenize(text, verbose=False).input_ids)
            for text in (case.text, case.source_text, case.other_text)
        )
        for case in cases
    ]
    for length in sorted({*lengths}):
        indices = [i for i, other in enumerate(lengths) if other == length]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def run(
    model: Model,
    method: Method,
    settings: Sequence[Setting],
    cases: Sequence[Case],
    progress: Callable[[int], object],
) -> list[Sounds]:
    """The sounds of each setting, in the order of the cases."""
    results = [[np.empty(0)] * len(cases) for _ in settings]
    for indices in equal_lengths(model, cases):
        of_setting = method.prepare(model, [cases[i] for i in indices])
        for setting, sounds in zip(settings, results, strict=True):
            for i, sound in zip(indices, of_setting(setting), strict=True):
                sounds[i] = np.asarray(sound)
            progress(len(indices))
    return results


def score(task: Task, cases: Sequence[Case], sounds: Sounds) -> Score:
    """Judge a method's sounds."""
    checks: list[Checks] = [task.judge(case, sound) for case, sound in zip(cases, sounds, strict=True)]
    figures = [task.figure(case, sound) for case, sound in zip(cases, sounds, strict=True)]
    return Score(
        right=sum(all(one.values()) for one in checks) / len(checks),
        figure=float(np.mean(figures)),
        missed=dict(Counter(name for one in checks for name, right in one.items() if not right)),
    )


def measure_task(
    model: Model, task: Task, count: int, chosen_on: int, seed: int, progress: Callable[[int], object]
) -> list[Row]:
    """Measure the floor, the ceiling and the methods of a task, in this order.

    Args:
        model: what is measured.
        task: what to do.
        count: how many cases are reported.
        chosen_on: how many others settings are chosen on, the one with the most right sounds.
        seed: of the cases.
        progress: called with the number of sounds that were made.
    """
    cases, others = (
        draw_cases(task.name, task.make, number, seed, chosen)
        for number, chosen in ((count, False), (chosen_on, True))
    )
    rows = []
    for method in (task.floor, task.ceiling, *task.methods):
        grid: list[tuple[Setting, Score]] = []
        setting = method.settings[0]
        if len(method.settings) > 1:
            tried = run(model, method, method.settings, others, progress)
            scores = [score(task, others, sounds) for sounds in tried]
            grid = [*zip(method.settings, scores, strict=True)]
            setting = max(grid, key=lambda pair: pair[1].right)[0]  # the first of equals
        [sounds] = run(model, method, [setting], cases, progress)
        rows.append(Row(method.name, setting, score(task, cases, sounds), grid))
    return rows


def sounds_to_make(tasks: Sequence[Task], count: int, chosen_on: int) -> int:
    """How many sounds `measure_task` makes for some tasks."""
    total = 0
    for task in tasks:
        for method in (task.floor, task.ceiling, *task.methods):
            total += count + (chosen_on * len(method.settings) if len(method.settings) > 1 else 0)
    return total
