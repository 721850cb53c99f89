"""Figures of matplotlib, for `audioldm2.plots`: making them, showing them in a notebook, writing files.

The extra "plot" installs matplotlib, which is imported when a figure is made. pyplot is not used: no backend
is selected for the whole program, and no figure has to be closed.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from audioldm2.atomic import check_writable, replacing
from audioldm2.audio.file_types import image_type
from audioldm2.extras import import_extra
from audioldm2.quoting import shortened

DPI = 120
WIDTH, HEIGHT = 9.0, 4.0  # of a figure with one panel, in inches
CHARACTERS_PER_INCH = 150  # of text of one point; longer titles are wrapped
MAX_TITLE = 300  # characters
SMALL = 8  # size of the text in small panels, in points
COLUMNS = 4  # small panels side by side, at most


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Any:
    """An empty figure, which a notebook shows as a PNG image.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ImportError: matplotlib is not installed or is broken; the message says how to install it.
    """
    module = import_extra("matplotlib.figure", "plot", "plotting")
    figure = module.Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    # IPython knows by itself how to show a Figure only after pyplot was imported.
    figure._repr_png_ = partial(png, figure)
    return figure


def set_title(axes: Any, title: str | None, size: float = 12) -> None:
    """Set the title of axes, on several lines if it is longer than the axes are wide.

    Args:
        axes: matplotlib's Axes.
        title: any text, which is not read as a formula; None for no title.
        size: of the font, in points.
    """
    if title is None:
        return
    width = CHARACTERS_PER_INCH / size * axes.bbox.width / axes.figure.dpi
    lines = textwrap.wrap(shortened(title, MAX_TITLE), max(8, int(width)))
    axes.set_title("\n".join(lines), parse_math=False, fontsize=size)


def set_heading(figure: Any, title: str | None) -> None:
    """Set the title of a whole figure, on several lines if it is long."""
    if title is not None:
        width = int(CHARACTERS_PER_INCH / 12 * figure.get_figwidth())
        lines = textwrap.wrap(shortened(title, MAX_TITLE), width)
        figure.suptitle("\n".join(lines), parse_math=False, fontsize=12)


def small_panels(count: int, rows_high: float, columns: int = COLUMNS) -> tuple[Any, list[Any]]:
    """A figure with small panels for `count` spectrograms, in rows, with common axes.

    Args:
        count: number of panels.
        rows_high: height of a row in inches.
        columns: panels in a row, at most.

    Returns:
        The figure, and the axes of each panel.
    """
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)
    figure = new_figure(WIDTH, 0.9 + rows_high * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    for axes in grid[-2, count % columns :] if rows > 1 and count % columns else ():
        axes.tick_params(labelbottom=True)  # nothing is below them
    for axes in grid.flat:
        axes.tick_params(labelsize=SMALL)
    return figure, list(grid.flat[:count])


def color_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    """Add the color bar of small panels.

    Args:
        figure: matplotlib's Figure.
        image: the AxesImage whose colors it explains.
        axes: the panels beside which it stands.
        label: text along it.
    """
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=40)
    bar.set_label(label, fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)


def png(figure: Any, dpi: int = DPI) -> bytes:
    """A figure as a PNG file of `dpi` pixels per inch."""
    file = io.BytesIO()
    with _quiet():
        figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def save_figure(path: str | Path, figure: Any) -> None:
    """Save a figure as an image. On failure, no partial file is left.

    Args:
        path: path of the file; its suffix decides the type, PNG by default.
        figure: matplotlib's Figure.

    Raises:
        OSError: the file cannot be written.
        ValueError: the suffix is unknown.
    """
    kind = image_type(path)
    check_writable(path)
    with replacing(path) as temporary, _quiet():
        figure.savefig(temporary, format=kind)


def check_can_draw(path: str | Path = "") -> None:
    """Check that figures can be drawn, by drawing an empty one.

    Args:
        path: path of the file, which is not touched; its suffix decides the type.

    Raises:
        ImportError: matplotlib is not installed or is broken; the message says how to install it.
        ValueError: the suffix is unknown.
    """
    kind = image_type(path)
    figure = new_figure()
    try:
        figure.savefig(io.BytesIO(), format=kind)
    except Exception as error:  # of a library for images, for example
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ImportError(f"matplotlib cannot write {kind} files here ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about characters that the font lacks, such as those of a title. They are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield
