"""Weight maps: how a stage's parameters are built from a checkpoint's tensors, written down as data.

There is one text file per stage and checkpoint format in `weights_map/`, meant to be read next to the stage.
The left side of `=` is a parameter of the stage, the right side the checkpoint tensors that it is made from:

    conv_in.*                         = conv_in.*
    blocks.{i}.down.weight            = transpose(h.{i}.mlp.c_proj.weight)

    [encoder.levels.{i}.attention     = encoder.down_blocks.{i}.attentions.0]
    [encoder.middle.attention         = encoder.mid_block.attentions.0]
    norm.*                            = group_norm.*
    qkv.*                             = concat(to_q.*, to_k.*, to_v.*)
                                      | concat(query.*, key.*, value.*)
    ignore position_ids               : saved by older releases; computed here

* `{i}` (any name in braces) matches a number and `*` matches one name without a dot (`weight`, `bias`, ...).
  Each stands for the same text on both sides. The first line whose left side matches a parameter applies.
* `[ours = theirs]` opens a section. In the lines below it, `ours.` is put before every parameter name and
  `theirs.` before every tensor name. Headers that follow one another share the lines below them. A section
  ends at the next header or at `[]`; lines outside a section give names in full.
* `|` separates alternatives, and a line that begins with `|` adds one to the line before it. Loading takes
  the first alternative whose tensors all exist. Saving writes the first one, which is the current spelling.
* An operation combines or reshapes tensors: `concat` (along the first axis, equal parts: fused q/k/v),
  `squeeze` (a 1x1 convolution used as a linear map), `transpose` (GPT-2's "Conv1D") and
  `fold_weight_norm(g, v)` (w = g v / |v|, Salimans and Kingma 2016). Each has an inverse, used for saving.
* `ignore NAME : REASON` names a checkpoint tensor that is left unread. `**` matches the rest of a name, dots
  included.
* `optional_prefix P` says that a checkpoint may have P before every name. It is written outside of sections.
* `#` begins a comment.

Loading is exact: every tensor of the checkpoint is used or ignored, every parameter is filled, and every
shape is checked before a tensor is read. Mismatches are reported in one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.operations import OPERATIONS, Shape
from audioldm2.quoting import listed, one_line, printable, quoted

_PLACEHOLDER = re.compile(r"\{(\w+)\}|\*")
_PREFIX = r"([\w{}]+(?:\.[\w{}]+)*)"  # in a header: names joined by dots
_HEADER = re.compile(rf"\[\s*{_PREFIX}\s*=\s*{_PREFIX}\s*\]")


@dataclass(frozen=True)
class Recipe:
    """An operation and the names of the checkpoint tensors that it takes."""

    operation: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        joined = ", ".join(self.sources)
        return joined if self.operation == "copy" else f"{self.operation}({joined})"


@dataclass(frozen=True)
class Rule:
    """A line `target = alternatives`, its names in full but with `{i}` and `*` in them."""

    target: str
    pattern: re.Pattern[str]  # matches the parameters that `target` stands for
    alternatives: tuple[Recipe, ...]

    def recipes(self, parameter: str) -> tuple[Recipe, ...] | None:
        """The alternatives for a parameter, their names filled in; None if the rule does not match it."""
        match = self.pattern.fullmatch(parameter)
        if match is None:
            return None
        found = match.groupdict()

        def fill(name: str) -> str:
            return _PLACEHOLDER.sub(lambda m: found[m.group(1) or "star"], name)

        return tuple(Recipe(r.operation, tuple(map(fill, r.sources))) for r in self.alternatives)


@dataclass(frozen=True)
class Section:
    """What a header `[ours = theirs]` puts before names: "" or a prefix that ends in a dot."""

    ours: str = ""
    theirs: str = ""


def _pattern(text: str) -> re.Pattern[str]:
    """A regular expression for a name with `{i}`, `*` and `**`."""
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


def _recipe(text: str) -> Recipe:
    match = re.fullmatch(r"(?:(\w+)\((.*)\)|([^\s()]+))", text.strip())
    if match is None:
        raise ValueError(f"cannot read '{text.strip()}'")
    operation, arguments, name = match.groups()
    if name is not None:
        return Recipe("copy", (name,))
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation '{operation}'; known are {', '.join(OPERATIONS)}")
    sources = tuple(part.strip() for part in arguments.split(","))
    if not all(sources):
        raise ValueError(f"cannot read '{text.strip()}'")
    least, most = OPERATIONS[operation].takes
    if len(sources) < least or (most is not None and len(sources) > most):
        takes = f"{least} tensor{'s' * (least > 1)}" if most is not None else f"{least} or more tensors"
        raise ValueError(f"{operation} takes {takes}, got {len(sources)}: '{text.strip()}'")
    return Recipe(operation, sources)


def _check_placeholders(target: str, sources: str) -> None:
    known = {match.group() for match in _PLACEHOLDER.finditer(target)}
    for match in _PLACEHOLDER.finditer(sources):
        if match.group() not in known:
            raise ValueError(f"{match.group()} is not on the left side, '{target}'")


def _alternatives(target: str, text: str, section: Section) -> tuple[Recipe, ...]:
    """The recipes that `text` lists, separated by `|`, for a parameter `target`; names are made full."""
    recipes = []
    for recipe in map(_recipe, text.split("|")):
        full = Recipe(recipe.operation, tuple(section.theirs + source for source in recipe.sources))
        _check_placeholders(target, ", ".join(full.sources))
        recipes.append(full)
    return tuple(recipes)


class _Parser:
    """Reads a map line by line into `rules`, `ignored` and `prefix`.

    The private methods read one kind of line each and return the name of that kind.
    """

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.ignored: list[tuple[re.Pattern[str], str]] = []
        self.prefix = ""
        self._sections = [Section()]  # those that the next line belongs to
        self._previous = ""  # the kind of the line before

    def read(self, line: str) -> None:
        """Read a line without comment, indentation and trailing blanks; ValueError if it is malformed."""
        keyword, _, rest = line.partition(" ")
        if line.startswith("["):
            kind = self._header(line)
        elif line.startswith("|"):
            kind = self._more(line[1:])
        elif keyword == "ignore":
            kind = self._ignore(rest)
        elif keyword == "optional_prefix":
            kind = self._optional_prefix(rest.strip())
        elif "=" in line:
            kind = self._rule(line)
        else:
            raise ValueError(
                f"cannot read '{line}'; expected 'ours = theirs', '| theirs', '[ours = theirs]', "
                "'ignore NAME : REASON' or 'optional_prefix P'"
            )
        self._previous = kind

    def _header(self, line: str) -> str:
        if line == "[]":
            if self._previous == "header":
                raise ValueError("the section that ends here has no lines")
            self._sections = [Section()]
            return "end of section"
        match = _HEADER.fullmatch(line)
        if match is None:
            raise ValueError(f"cannot read '{line}'; a header is '[ours = theirs]' without '*', or '[]'")
        ours, theirs = match.groups()
        _check_placeholders(ours, theirs)
        others = self._sections if self._previous == "header" else []
        self._sections = [*others, Section(f"{ours}.", f"{theirs}.")]
        return "header"

    def _rule(self, line: str) -> str:
        name, _, sources = line.partition("=")
        for section in self._sections:
            target = section.ours + name.strip()
            self.rules.append(Rule(target, _pattern(target), _alternatives(target, sources, section)))
        return "rule"

    def _more(self, sources: str) -> str:
        if self._previous != "rule":
            raise ValueError("a line that begins with '|' has to follow 'ours = theirs'")
        last = self.rules[-len(self._sections) :]  # the line before, once for each section
        for position, (rule, section) in enumerate(zip(last, self._sections, strict=True), -len(last)):
            alternatives = rule.alternatives + _alternatives(rule.target, sources, section)
            self.rules[position] = replace(rule, alternatives=alternatives)
        return "rule"

    def _ignore(self, text: str) -> str:
        name, colon, reason = text.partition(" :")
        if not colon or not name.strip() or not reason.strip():
            raise ValueError("'ignore NAME : REASON' needs a name and a reason")
        for section in self._sections:
            self.ignored.append((_pattern(section.theirs + name.strip()), reason.strip()))
        return "ignore"

    def _optional_prefix(self, prefix: str) -> str:
        if self._sections != [Section()]:
            raise ValueError("'optional_prefix' must be outside of sections")
        if not prefix or " " in prefix:
            raise ValueError("'optional_prefix P' needs one prefix")
        self.prefix = prefix
        return "optional_prefix"


class WeightMap:
    """A parsed weight map: fits a checkpoint to a stage, and writes a stage as a checkpoint.

    Args:
        text: the map, in the language of this module's docstring.
        name: its name, for error messages.

    Raises:
        ValueError: the text is malformed. The message names the line.

    Example:
        >>> m = WeightMap("up.* = transpose(mlp.c_fc.*)")
        >>> str(m.plan({"up.weight": (8, 2)}, {"mlp.c_fc.weight": (2, 8)})["up.weight"])
        'transpose(mlp.c_fc.weight)'
    """

    def __init__(self, text: str, name: str = "map"):
        parser = _Parser()
        for number, line in enumerate([*text.splitlines(), "[]"], 1):  # the last section ends, too
            try:
                if content := line.split("#", 1)[0].strip():
                    parser.read(content)
            except ValueError as error:
                raise ValueError(f"{name}:{number}: {error}") from None
        self.name = name
        self.rules = parser.rules
        self.ignored = parser.ignored
        self.prefix = parser.prefix

    def recipes(self, target: str) -> tuple[Recipe, ...]:
        """The alternatives for a parameter, the current spelling first.

        Raises:
            ValueError: no line of the map matches the parameter.
        """
        for rule in self.rules:
            recipes = rule.recipes(target)
            if recipes is not None:
                return recipes
        raise ValueError(f"{self.name}: no line matches the parameter '{target}'")

    def plan(self, targets: Mapping[str, Shape], sources: Mapping[str, Shape]) -> dict[str, Recipe]:
        """Choose a recipe for each parameter, and check that the checkpoint fits the stage exactly.

        Args:
            targets: the stage's parameters, from name to shape.
            sources: the checkpoint's tensors, from name to shape.

        Returns:
            From each parameter's name to its recipe, whose sources are names in `sources`.

        Raises:
            CheckpointError: tensors are missing, unexpected, duplicate or of the wrong shape. The message
                counts them and describes the first.
        """
        # Names without the optional prefix, and how the checkpoint spells them.
        spelling: dict[str, str] = {}
        mismatches: list[str] = []
        for name in sources:
            first = spelling.setdefault(name.removeprefix(self.prefix), name)
            if first != name:
                mismatches.append(f"duplicate: {printable(first)} and {printable(name)}")
        plan: dict[str, Recipe] = {}
        used: set[str] = set()
        for target, expected in targets.items():
            alternatives = self.recipes(target)
            recipe = next((r for r in alternatives if all(s in spelling for s in r.sources)), None)
            if recipe is None:
                # Report the alternative with the largest share of its tensors present.
                nearest = max(
                    alternatives, key=lambda r: sum(s in spelling for s in r.sources) / len(r.sources)
                )
                used.update(s for s in nearest.sources if s in spelling)
                absent = [s for s in nearest.sources if s not in spelling]
                mismatches.append(
                    f"missing: {', '.join(absent)} (for the parameter {target}, shape {expected})"
                )
                continue
            used.update(recipe.sources)
            recipe = Recipe(recipe.operation, tuple(spelling[s] for s in recipe.sources))
            try:
                shape = OPERATIONS[recipe.operation].shape([tuple(sources[s]) for s in recipe.sources])
            except ValueError as error:
                mismatches.append(f"wrong shape: {recipe}: {one_line(error)}")
                continue
            if shape != expected:
                mismatches.append(
                    f"wrong shape: {recipe} gives {quoted(shape)}, the config expects {expected}"
                )
                continue
            plan[target] = recipe
        for name in sorted(spelling.keys() - used):
            if not any(pattern.fullmatch(name) for pattern, _ in self.ignored):
                shape = tuple(sources[spelling[name]])
                mismatches.append(f"unexpected: {printable(spelling[name])}, shape {quoted(shape)}")
        if mismatches:
            raise CheckpointError(
                f"{len(mismatches)} of the checkpoint's tensors do not fit: {listed(mismatches, '; ')}"
            )
        return plan

    def save(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint tensors of a stage: each line's first alternative, inverted.

        Args:
            state: the stage's parameters by name.

        Returns:
            The checkpoint's tensors by name, contiguous.
        """
        saved: dict[str, Tensor] = {}
        for target, tensor in state.items():
            recipe = self.recipes(target)[0]
            parts = OPERATIONS[recipe.operation].invert(tensor, len(recipe.sources))
            for name, part in zip(recipe.sources, parts, strict=True):
                saved[name] = part.contiguous()
        return saved


def apply(recipe: Recipe, read: Callable[[str], Tensor]) -> Tensor:
    """Make one parameter.

    Args:
        recipe: from `WeightMap.plan`.
        read: gives a checkpoint tensor by name.
    """
    return OPERATIONS[recipe.operation].apply([read(name) for name in recipe.sources])


def weight_map(name: str) -> WeightMap:
    """The map of that name in `weights_map/`: "unet.diffusers" is `weights_map/unet.diffusers.map`.

    Raises:
        FileNotFoundError: there is no such map.
    """
    package = Path(__file__).resolve().parents[1]
    # The maps are inside the package in a wheel, and next to it in a checkout.
    for folder in (package / "weights_map", package.parent / "weights_map"):
        path = folder / f"{name}.map"
        if path.is_file():
            return WeightMap(path.read_text(encoding="utf-8"), path.name)
    raise FileNotFoundError(f"weights_map/{name}.map is missing from this installation of audioldm2")
