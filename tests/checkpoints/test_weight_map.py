"""The weight maps: their language, the fitting of a checkpoint, and the maps that are shipped."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import OPERATIONS, Recipe, WeightMap, apply, weight_map
from tests.helpers import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "weights_map").glob("*.map"))


def shapes(**named: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names with dots written as two underscores."""
    return {name.replace("__", "."): shape for name, shape in named.items()}


def plan(
    text: str, targets: Mapping[str, tuple[int, ...]], sources: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The plan of a map, each recipe written out."""
    return {target: str(recipe) for target, recipe in WeightMap(text).plan(targets, sources).items()}


def misfits(
    text: str, targets: Mapping[str, tuple[int, ...]], sources: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The lines of the error, without its head."""
    with pytest.raises(CheckpointError) as caught:
        WeightMap(text).plan(targets, sources)
    head, *lines = str(caught.value).split("\n")
    assert head == f"{len(lines)} of the checkpoint's tensors do not fit:"
    return [line.strip() for line in lines]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# The language


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a.weight", "is neither"),
        ("a = fold(b)", "no operation 'fold'"),
        ("a = concat(b, c", "cannot read 'concat(b, c'"),
        ("a = b c", "cannot read 'b c'"),
        ("a = b |", "cannot read ''"),
        ("a =", "cannot read ''"),
        ("ignore a", "needs its reason"),
        ("ignore a :", "needs its reason"),
        ("ignore a : # a comment is no reason", "needs its reason"),
        ("optional_prefix", "is neither"),
        ("a.{i} = b.{j}", "{j} is not on the left"),
        ("a = b.*", "* is not on the left"),
        ("a = squeeze(b, c)", "squeeze takes 1"),
        ("a = fold_weight_norm(g)", "fold_weight_norm takes 2"),
        ("a = concat(b)", "concat takes 2 or more"),
        ("a = concat(b, )", "cannot read 'concat(b, )'"),
    ],
)
def test_an_error_names_the_line(line, complaint):
    text = f"# a comment\n\nx = y\n{line}\nz = w\n"
    with pytest.raises(ValueError, match=r"^broken\.map:4: .*" + re.escape(complaint)):
        WeightMap(text, "broken.map")


def test_comments_and_blank_lines_say_nothing():
    text = "\n# a = b\n  a  =  c   # a = d\n\n"
    assert plan(text, shapes(a=(2,)), shapes(c=(2,))) == {"a": "c"}


def test_numbers_and_stars_are_filled_in():
    text = "b.{i}.a.{j}.* = blocks.{j}.attn.{i}.*"
    found = plan(text, shapes(b__3__a__12__weight=(2,)), shapes(blocks__12__attn__3__weight=(2,)))
    assert found == {"b.3.a.12.weight": "blocks.12.attn.3.weight"}


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("a.*", "a.weight", True),
        ("a.*", "a.b.weight", False),
        ("a.*", "a", False),
        ("a.*", "axweight", False),
        ("{i}.a", "10.a", True),
        ("{i}.a", "x.a", False),
        ("{i}.a.{i}", "1.a.1", True),
        ("{i}.a.{i}", "1.a.2", False),
        ("a", "ab", False),
    ],
)
def test_what_a_pattern_stands_for(pattern, name, fits):
    text = f"{pattern} = x"
    if fits:
        assert plan(text, {name: (1,)}, {"x": (1,)}) == {name: "x"}
    else:
        with pytest.raises(ValueError, match=f"no line for our parameter '{name}'"):
            plan(text, {name: (1,)}, {"x": (1,)})


def test_the_first_line_that_fits_counts():
    text = "a.weight = special\na.* = a.*"
    found = plan(text, shapes(a__weight=(1,), a__bias=(1,)), {"special": (1,), "a.bias": (1,)})
    assert found == {"a.weight": "special", "a.bias": "a.bias"}


# Alternatives, prefixes, and what may be left unread


def test_the_first_alternative_that_is_there_is_taken():
    text = "a = new | concat(q, k) | old"
    targets = {"a": (4,)}
    assert plan(text, targets, {"new": (4,)}) == {"a": "new"}
    assert plan(text, targets, {"q": (2,), "k": (2,)}) == {"a": "concat(q, k)"}
    assert plan(text, targets, {"old": (4,)}) == {"a": "old"}
    # The other spelling beside it is not passed over.
    assert misfits(text, targets, {"new": (4,), "old": (4,)}) == ["unexpected: old, shape (4,)"]


def test_the_nearest_alternative_is_the_one_reported():
    text = "a = new | concat(q, k, v)"
    lines = misfits(text, {"a": (6,)}, {"q": (2,), "v": (2,)})
    assert lines == ["missing: k (for our a, shape (6,))"]


def test_the_optional_prefix():
    text = "optional_prefix model.\na = a\nb = b"
    targets = {"a": (1,), "b": (2,)}
    assert plan(text, targets, {"a": (1,), "b": (2,)}) == {"a": "a", "b": "b"}
    assert plan(text, targets, {"model.a": (1,), "model.b": (2,)}) == {"a": "model.a", "b": "model.b"}
    # An error speaks of the checkpoint's own names.
    lines = misfits(text, targets, {"model.a": (3,), "model.b": (2,), "model.c": (1,)})
    assert lines[0].startswith("wrong shape: model.a")
    assert lines[1] == "unexpected: model.c, shape (1,)"


def test_a_tensor_with_and_without_the_prefix_is_one_too_many():
    text = "optional_prefix model.\na = a"
    assert misfits(text, {"a": (1,)}, {"a": (1,), "model.a": (1,)}) == ["twice: a and model.a"]


def test_what_is_ignored():
    text = "a = a\nignore position_ids : computed\nignore h.{i}.bias : a buffer"
    assert plan(
        text, {"a": (1,)}, {"a": (1,), "position_ids": (7,), "h.0.bias": (2,), "h.11.bias": (2,)}
    ) == {"a": "a"}
    lines = misfits(text, {"a": (1,)}, {"a": (1,), "h.bias": (2,), "x.position_ids": (7,)})
    assert lines == ["unexpected: h.bias, shape (2,)", "unexpected: x.position_ids, shape (7,)"]


def test_an_ignored_prefix_takes_all_that_is_below_it():
    text = "a = a\nignore flow.** : not used"
    sources = {"a": (1,), "flow.b": (1,), "flow.0.c.1.parametrizations.weight.original0": (1,)}
    assert plan(text, {"a": (1,)}, sources) == {"a": "a"}
    lines = misfits(text, {"a": (1,)}, {"a": (1,), "flow": (1,), "flower.b": (1,), "my.flow.b": (1,)})
    assert [line.split(",")[0] for line in lines] == [
        f"unexpected: {n}" for n in ("flow", "flower.b", "my.flow.b")
    ]


def test_all_misfits_are_in_one_error():
    text = (
        "a = x\nb = y\nc = concat(p, q)\nd = squeeze(s)\ne = transpose(t)\nf = fold_weight_norm(g, v)\nh = z"
    )
    targets = {"a": (1,), "b": (2,), "c": (4,), "d": (3, 2), "e": (2, 3), "f": (2, 3, 5), "h": (1,)}
    sources = {
        "y": (3,),
        "p": (2,),
        "q": (3,),
        "s": (3, 2, 1, 3),
        "t": (2, 3),
        "g": (3, 1, 1),
        "v": (2, 3, 5),
        "z": (1,),
        "extra": (8,),
    }
    lines = misfits(text, targets, sources)
    assert lines == [
        "missing: x (for our a, shape (1,))",
        "wrong shape: y gives (3,), the config asks for (2,)",
        "wrong shape: concat(p, q): these cannot be joined: (2,), (3,)",
        "wrong shape: squeeze(s): (3, 2, 1, 3) is not a 1x1 convolution",
        "wrong shape: transpose(t) gives (3, 2), the config asks for (2, 3)",
        "wrong shape: fold_weight_norm(g, v): the gain (3, 1, 1) does not go with the direction (2, 3, 5)",
        "unexpected: extra, shape (8,)",
    ]


def test_a_number_where_a_matrix_should_be_is_a_misfit():
    text = "a = concat(p, q)\nb = fold_weight_norm(g, v)\nc = squeeze(s)\nd = transpose(t)"
    lines = misfits(text, dict.fromkeys("abcd", (2, 2)), dict.fromkeys(("p", "q", "g", "v", "s", "t"), ()))
    assert [line.split("(")[0] for line in lines] == [
        f"wrong shape: {operation}" for operation in ("concat", "fold_weight_norm", "squeeze", "transpose")
    ]


# The operations


@pytest.mark.parametrize(
    ("operation", "names", "shape"),
    [
        ("copy", ("a",), (3, 4)),
        ("concat", ("a", "b", "c"), (6, 4)),
        ("concat", ("a", "b"), (6,)),
        ("squeeze", ("a",), (3, 4)),
        ("transpose", ("a",), (3, 4)),
        ("fold_weight_norm", ("g", "v"), (3, 4, 5)),
        ("fold_weight_norm", ("g", "v"), (3, 4)),
    ],
)
def test_every_operation_has_its_inverse(operation, names, shape):
    weight = random(*shape)
    parts = OPERATIONS[operation].invert(weight, len(names))
    assert len(parts) == len(names)
    assert OPERATIONS[operation].shape([tuple(part.shape) for part in parts]) == shape
    tensors = dict(zip(names, parts, strict=True))
    torch.testing.assert_close(
        apply(Recipe(operation, names), tensors.__getitem__), weight, rtol=1e-6, atol=1e-6
    )


def test_every_operation_is_tested_above():
    assert set(OPERATIONS) == {"copy", "concat", "squeeze", "transpose", "fold_weight_norm"}


def test_concat_keeps_the_order():
    tensors = {"q": torch.tensor([1.0]), "k": torch.tensor([2.0]), "v": torch.tensor([3.0])}
    assert apply(Recipe("concat", ("q", "k", "v")), tensors.__getitem__).tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_norm_is_torchs(dtype):
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 3, 5))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.7)
    state = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
    recipe = Recipe("fold_weight_norm", tuple(f"parametrizations.weight.original{i}" for i in (0, 1)))
    folded = apply(recipe, state.__getitem__)
    assert folded.dtype == dtype
    torch.testing.assert_close(
        folded.float(), layer.weight, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-2
    )


# There and back


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6) for _ in range(2)])
        self.point = nn.Linear(4, 3, bias=False)
        self.back = nn.Linear(4, 3)


STAGE_MAP = """
optional_prefix net.
layers.{i}.* = concat(l.{i}.q.*, l.{i}.k.*) | l.{i}.qk.*
point.weight = squeeze(conv.weight)
back.weight  = transpose(back.w)
back.bias    = back.b
"""


def test_fill_and_save_are_inverse():
    tensors = {"conv.weight": random(3, 4, 1, 1), "back.w": random(4, 3), "back.b": random(3)}
    for layer in range(2):
        for part in "qk":
            tensors[f"l.{layer}.{part}.weight"] = random(3, 4) + layer
            tensors[f"l.{layer}.{part}.bias"] = random(3) - layer
    maps = WeightMap(STAGE_MAP)
    with torch.device("meta"):
        stage = Stage()
    fill(stage, maps, TensorDict({f"net.{name}": tensor for name, tensor in tensors.items()}))
    assert torch.equal(stage.layers[1].weight, torch.cat([tensors["l.1.q.weight"], tensors["l.1.k.weight"]]))
    assert torch.equal(stage.back.weight, tensors["back.w"].t())
    saved = maps.save(stage.state_dict())
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor), name
        assert saved[name].is_contiguous(), name


# What is shipped


def test_there_are_maps():
    assert {"projection_model.diffusers", "language_model.transformers", "vocoder.transformers"} <= set(
        SHIPPED
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_map_is_sound(name):
    shipped = weight_map(name)
    assert shipped.rules
    for pattern, reason in shipped.ignored:
        assert len(reason.split()) >= 3, f"{pattern.pattern}: '{reason}' is hardly a reason"
    for rule in shipped.rules:
        known = set(rule.target.groupindex)
        for recipe in rule.alternatives:
            for source in recipe.sources:
                used = {
                    "star" if piece == "*" else piece[1:-1] for piece in re.findall(r"\{\w+\}|\*", source)
                }
                assert used <= known, (
                    f"{source} uses {used - known}, which {rule.target.pattern} does not give"
                )
        # Saving writes the first alternative, so that must be one with an exact inverse.
        assert rule.alternatives[0].operation != "fold_weight_norm"


def test_a_map_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"weights_map/nothing\.map is missing"):
        weight_map("nothing")
