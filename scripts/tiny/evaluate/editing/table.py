"""The results in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.tiny.evaluate.editing.methods import Setting
from scripts.tiny.evaluate.editing.running import Row
from scripts.tiny.evaluate.editing.tasks import Task


def task_section(task: Task, rows: Sequence[Row], count: int, chosen_on: int, about: str) -> str:
    """The section of a task: its table, and below it how the settings did from which the best was chosen.

    Args:
        task: the task.
        rows: its results.
        count: the number of sounds in the table.
        chosen_on: the number of others.
        about: how the pipeline was called.
    """
    lines = [
        f"### {task.title}",
        "",
        f"{task.about}",
        "",
        f"| {count} sounds | setting | right | {task.unit} | what was wrong |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        wrong = ", ".join(f"{name} {n}" for name, n in sorted(row.score.missed.items(), key=lambda m: -m[1]))
        lines.append(
            f"| {row.name} | {words(row.setting)} | {100 * row.score.right:.0f} % | {row.score.figure:.1f} "
            f"| {wrong} |"
        )
    chosen = [row for row in rows if row.grid]
    if chosen:
        lines += ["", f"Chosen on {chosen_on} other sounds, with {task.unit} in parentheses:", ""]
        for row in chosen:
            tried = "; ".join(
                f"{words(setting) or 'default'}: {100 * score.right:.0f} % ({score.figure:.1f})"
                for setting, score in row.grid
            )
            lines.append(f"- {row.name}: {tried}")
    lines += ["", about]
    return "\n".join(lines)


def words(setting: Setting) -> str:
    """A setting as the arguments of a call."""
    return ", ".join(f"`{name}={_plain(value)}`" for name, value in setting.items())


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_plain(one) for one in value)})"
    if isinstance(value, list):
        return f"[{', '.join(_plain(one) for one in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
