"""Weight maps: which of our parameters is made from which checkpoint tensors, as data.

A map is a text file in `weights_map/`, one a stage and source format, to be read beside the stage:

    # target (ours)                 = sources (the checkpoint's)
    down.{i}.conv.*                 = down_blocks.{i}.downsamplers.0.conv.*
    qkv.weight                      = concat(to_q.weight, to_k.weight, to_v.weight) | concat(query.weight, ..)
    ignore embeddings.position_ids  : a buffer that older releases saved; it is computed here
    optional_prefix transformer.

* `{i}` (any name in braces) stands for a number, `*` for one name without a dot (`weight`, `bias`, ...); both
  sides take the same value. In `ignore`, `**` stands for any rest of a name, dots included.
* `|` parts alternatives, the spelling of today first: loading takes the first whose tensors all exist, saving
  writes the first.
* An operation turns several tensors, or one of another form, into ours: `concat` (along the first axis, equal
  parts: fused q/k/v), `squeeze` (a 1x1 convolution that is a linear map), `transpose` (GPT-2's "Conv1D"),
  `fold_weight_norm(g, v)` (Salimans and Kingma 2016, w = g v / |v|). Each has its inverse: a map also saves.
* `ignore NAME : REASON` names a checkpoint tensor that may be left unread.
* `optional_prefix P`: the checkpoint may carry P before every name.

Fitting is exact: every tensor of the checkpoint is used or ignored, every parameter of ours is filled, and
every shape is checked before anything is read. What does not fit is one error that lists all the misfits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from audioldm2.checkpoints.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """How checkpoint tensors become one of ours: the resulting shape, the tensor, and the way back."""

    shape: Callable[[Sequence[Shape]], Shape]
    apply: Callable[[Sequence[Tensor]], Tensor]
    invert: Callable[[Tensor, int], list[Tensor]]


def _concat_shape(shapes: Sequence[Shape]) -> Shape:
    if len(set(shapes)) != 1 or not shapes[0]:
        raise ValueError(f"these cannot be joined: {', '.join(map(str, shapes))}")
    return (len(shapes) * shapes[0][0], *shapes[0][1:])


def _squeeze_shape(shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    if len(shape) != 4 or shape[2:] != (1, 1):
        raise ValueError(f"{shape} is not a 1x1 convolution")
    return shape[:2]


def _transpose_shape(shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    if len(shape) != 2:
        raise ValueError(f"{shape} is not a matrix")
    return shape[::-1]


def _weight_norm_shape(shapes: Sequence[Shape]) -> Shape:
    gain, direction = shapes
    if not direction or gain != (direction[0],) + (1,) * (len(direction) - 1):
        raise ValueError(f"the gain {gain} does not go with the direction {direction}")
    return direction


def _norm_but_first(weight: Tensor) -> Tensor:
    return weight.float().flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


def _fold_weight_norm(tensors: Sequence[Tensor]) -> Tensor:
    gain, direction = tensors
    return (gain.float() * direction.float() / _norm_but_first(direction)).to(direction.dtype)


OPERATIONS = {
    "copy": Operation(lambda s: s[0], lambda t: t[0], lambda w, n: [w]),
    "concat": Operation(_concat_shape, lambda t: torch.cat(list(t)), lambda w, n: list(w.chunk(n))),
    "squeeze": Operation(_squeeze_shape, lambda t: t[0][:, :, 0, 0], lambda w, n: [w[:, :, None, None]]),
    "transpose": Operation(_transpose_shape, lambda t: t[0].t(), lambda w, n: [w.t()]),
    "fold_weight_norm": Operation(
        _weight_norm_shape, _fold_weight_norm, lambda w, n: [_norm_but_first(w).to(w.dtype), w]
    ),
}


# How many tensors an operation takes, where that is not one.
_TAKES = {"concat": "2 or more", "fold_weight_norm": "2"}


@dataclass(frozen=True)
class Recipe:
    """An operation and the checkpoint tensors that it takes, by name."""

    operation: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        joined = ", ".join(self.sources)
        return joined if self.operation == "copy" else f"{self.operation}({joined})"


@dataclass(frozen=True)
class Rule:
    target: re.Pattern[str]
    alternatives: tuple[Recipe, ...]  # with {i} and * still in the sources' names

    def recipes(self, target: str) -> tuple[Recipe, ...] | None:
        """The alternatives for one parameter of ours, names filled in; None where the rule is not for it."""
        match = self.target.fullmatch(target)
        if match is None:
            return None
        found = match.groupdict()

        def fill(name: str) -> str:
            return re.sub(r"\{(\w+)\}|\*", lambda m: found[m.group(1) or "star"], name)

        return tuple(Recipe(r.operation, tuple(map(fill, r.sources))) for r in self.alternatives)


def _pattern(text: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\}|\*\*|\*)", text)
    seen: set[str] = set()
    regex = ""
    for piece in pieces:
        name = "star" if piece == "*" else piece[1:-1] if piece.startswith("{") else ""
        if piece == "**":
            regex += ".+"
        elif not name:
            regex += re.escape(piece)
        elif name in seen:
            regex += f"(?P={name})"
        else:
            seen.add(name)
            regex += f"(?P<{name}>{r'[^.]+' if name == 'star' else r'[0-9]+'})"
    return re.compile(regex)


def _recipe(text: str, where: str) -> Recipe:
    match = re.fullmatch(r"(?:(\w+)\((.*)\)|([^\s()]+))", text.strip())
    if match is None:
        raise ValueError(f"{where}: cannot read '{text.strip()}'")
    operation, arguments, name = match.groups()
    if name is not None:
        return Recipe("copy", (name,))
    if operation not in OPERATIONS:
        raise ValueError(f"{where}: no operation '{operation}'; there are {', '.join(OPERATIONS)}")
    sources = tuple(part.strip() for part in arguments.split(","))
    if not all(sources):
        raise ValueError(f"{where}: cannot read '{text.strip()}'")
    takes = _TAKES.get(operation, "1")
    if len(sources) < 2 if takes == "2 or more" else len(sources) != int(takes):
        raise ValueError(f"{where}: {operation} takes {takes}, not {len(sources)}: '{text.strip()}'")
    return Recipe(operation, sources)


def _rule(target: str, sources: str, where: str) -> Rule:
    rule = Rule(_pattern(target), tuple(_recipe(part, where) for part in sources.split("|")))
    known = set(re.findall(r"\{\w+\}|\*", target))
    for recipe in rule.alternatives:
        for blank in re.findall(r"\{\w+\}|\*", " ".join(recipe.sources)):
            if blank not in known:
                raise ValueError(f"{where}: {blank} is not on the left of '{target} = ...'")
    return rule


class WeightMap:
    """One map, parsed. Raises ValueError, with the line, where the text is not a map."""

    def __init__(self, text: str, name: str = "map"):
        self.name = name
        self.rules: list[Rule] = []
        self.ignored: list[tuple[re.Pattern[str], str]] = []
        self.prefix = ""
        for number, raw in enumerate(text.splitlines(), 1):
            where = f"{name}:{number}"
            line = raw.split("#", 1)[0].strip()
            if not line:
                continue
            if line.startswith("ignore "):
                pattern, colon, reason = line[len("ignore ") :].partition(" :")
                if not colon or not reason.strip():
                    raise ValueError(f"{where}: 'ignore NAME : REASON' needs its reason")
                self.ignored.append((_pattern(pattern.strip()), reason.strip()))
            elif line.startswith("optional_prefix "):
                self.prefix = line.split()[1]
            elif "=" in line:
                target, sources = (side.strip() for side in line.split("=", 1))
                self.rules.append(_rule(target, sources, where))
            else:
                raise ValueError(
                    f"{where}: '{line}' is neither 'ours = theirs', 'ignore' nor 'optional_prefix'"
                )

    def _recipes(self, target: str) -> tuple[Recipe, ...]:
        for rule in self.rules:
            recipes = rule.recipes(target)
            if recipes is not None:
                return recipes
        raise ValueError(f"{self.name}: no line for our parameter '{target}'")

    def plan(self, targets: Mapping[str, Shape], sources: Mapping[str, Shape]) -> dict[str, Recipe]:
        """Fit a checkpoint to a stage: from our names and shapes and theirs to a recipe for each of ours.

        Raises:
            CheckpointError: one line a misfit: tensors that are missing, left over or of another shape.
        """
        # The checkpoint's own spelling for each name without the optional prefix.
        bare: dict[str, str] = {}
        misfits: list[str] = []
        for name in sources:
            first = bare.setdefault(name.removeprefix(self.prefix), name)
            if first != name:
                misfits.append(f"twice: {first} and {name}")
        chosen: dict[str, Recipe] = {}
        used: set[str] = set()
        for target, wanted in targets.items():
            alternatives = self._recipes(target)
            recipe = next((r for r in alternatives if all(s in bare for s in r.sources)), None)
            if recipe is None:
                # The alternative that is nearest to being there is the one to report.
                nearest = max(alternatives, key=lambda r: sum(s in bare for s in r.sources) / len(r.sources))
                used.update(s for s in nearest.sources if s in bare)
                absent = [s for s in nearest.sources if s not in bare]
                misfits.append(f"missing: {', '.join(absent)} (for our {target}, shape {wanted})")
                continue
            used.update(recipe.sources)
            named = Recipe(recipe.operation, tuple(bare[s] for s in recipe.sources))
            shapes = [tuple(sources[s]) for s in named.sources]
            try:
                found = OPERATIONS[recipe.operation].shape(shapes)
            except ValueError as error:
                misfits.append(f"wrong shape: {named}: {error}")
                continue
            if found != wanted:
                misfits.append(f"wrong shape: {named} gives {found}, the config asks for {wanted}")
                continue
            chosen[target] = named
        for name in sorted(bare.keys() - used):
            if not any(pattern.fullmatch(name) for pattern, _ in self.ignored):
                misfits.append(f"unexpected: {bare[name]}, shape {tuple(sources[bare[name]])}")
        if misfits:
            shown = "\n  ".join(misfits)
            raise CheckpointError(f"{len(misfits)} of the checkpoint's tensors do not fit:\n  {shown}")
        return chosen

    def save(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From our parameters to the checkpoint's tensors, today's spelling: the inverse of every line."""
        saved: dict[str, Tensor] = {}
        for target, tensor in state.items():
            recipe = self._recipes(target)[0]
            parts = OPERATIONS[recipe.operation].invert(tensor, len(recipe.sources))
            for name, part in zip(recipe.sources, parts, strict=True):
                saved[name] = part.contiguous()
        return saved


def apply(recipe: Recipe, read: Callable[[str], Tensor]) -> Tensor:
    """Make one of our tensors: `read` gives a checkpoint tensor by name."""
    return OPERATIONS[recipe.operation].apply([read(name) for name in recipe.sources])


@cache
def weight_map(name: str) -> WeightMap:
    """The shipped map `name`, such as "unet.diffusers" (weights_map/unet.diffusers.map)."""
    package = Path(__file__).resolve().parents[1]
    # In a wheel the maps lie inside the package, in a checkout beside it.
    for folder in (package / "weights_map", package.parent / "weights_map"):
        path = folder / f"{name}.map"
        if path.is_file():
            return WeightMap(path.read_text(encoding="utf-8"), path.name)
    raise FileNotFoundError(f"weights_map/{name}.map is missing from this installation of audioldm2")
