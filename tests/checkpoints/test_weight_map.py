"""Weight maps: their notation, fitting a checkpoint to a stage, and the maps in the package."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.operations import OPERATIONS
from audioldm2.checkpoints.weight_map import Recipe, WeightMap, apply, weight_map
from tests.helpers import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "weights_map").glob("*.map"))


def shapes(**named: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names with dots written as two underscores."""
    return {name.replace("__", "."): shape for name, shape in named.items()}


def plan(
    text: str, targets: Mapping[str, tuple[int, ...]], sources: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """A map's plan, with each recipe as text."""
    return {target: str(recipe) for target, recipe in WeightMap(text).plan(targets, sources).items()}


def mismatches(
    text: str, targets: Mapping[str, tuple[int, ...]], sources: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The entries of the error that `plan` raises."""
    with pytest.raises(CheckpointError) as caught:
        WeightMap(text).plan(targets, sources)
    head, entries = str(caught.value).split(" do not fit: ")
    lines = entries.split("; ")
    assert head == f"{len(lines)} of the checkpoint's tensors"
    return lines


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# Notation


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.weight", "cannot read 'a.weight'; expected"),
        ("a = fold(b)", "unknown operation 'fold'"),
        ("a = concat(b, c", "cannot read 'concat(b, c'"),
        ("a = b c", "cannot read 'b c'"),
        ("a = b |", "cannot read ''"),
        ("a =", "cannot read ''"),
        ("ignore a", "needs a name and a reason"),
        ("ignore a :", "needs a name and a reason"),
        ("ignore a : # a comment is not a reason", "needs a name and a reason"),
        ("ignore : a reason", "needs a name and a reason"),
        ("optional_prefix", "needs one prefix"),
        ("optional_prefix a. b.", "needs one prefix"),
        ("a.{i} = b.{j}", "{j} is not on the left"),
        ("a = b.*", "* is not on the left"),
        ("a = squeeze(b, c)", "squeeze takes 1 tensor, got 2"),
        ("a = fold_weight_norm(g)", "fold_weight_norm takes 2 tensors, got 1"),
        ("a = concat(b)", "concat takes 2 or more tensors, got 1"),
        ("a = concat(b, )", "cannot read 'concat(b, )'"),
        ("| b c", "cannot read 'b c'"),
        ("| b.{i}", "{i} is not on the left"),
        ("|", "cannot read ''"),
        ("[a = b", "cannot read '[a = b'; a header is"),
        ("[a]", "cannot read '[a]'; a header is"),
        ("[a = ]", "cannot read '[a = ]'; a header is"),
        ("[a.* = b.*]", "cannot read '[a.* = b.*]'; a header is"),
        ("[a. = b.]", "cannot read '[a. = b.]'; a header is"),
        ("[a = concat(b, c)]", "cannot read '[a = concat(b, c)]'; a header is"),
        ("[a = b.{i}]", "{i} is not on the left side, 'a'"),
    ],
)
def test_an_error_names_the_line(line, message):
    text = f"# a comment\n\nx = y\n{line}\nz = w\n"
    with pytest.raises(ValueError, match=r"^broken\.map:4: .*" + re.escape(message)):
        WeightMap(text, "broken.map")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("| a", 1, "has to follow 'ours = theirs'"),
        ("[a = b]\n| c\nd = e", 2, "has to follow 'ours = theirs'"),
        ("a = b\nignore c : a reason\n| d", 3, "has to follow 'ours = theirs'"),
        ("a = b\n[]\n| c", 3, "has to follow 'ours = theirs'"),
        ("a = b\n| c\n| d e", 3, "cannot read 'd e'"),
        ("[a = b]\n[]\nc = d", 2, "the section that ends here has no lines"),
        ("a = b\n\n[c = d]", 4, "the section that ends here has no lines"),
        ("[a = b]\nc = d\noptional_prefix e.", 3, "must be outside of sections"),
        ("[a.{i} = b.{i}]\nc.{j} = d.{k}", 2, "{k} is not on the left side, 'a.{i}.c.{j}'"),
    ],
)
def test_an_error_names_the_line_in_context(text, line, message):
    with pytest.raises(ValueError, match=rf"^broken\.map:{line}: .*" + re.escape(message)):
        WeightMap(text, "broken.map")


def test_comments_and_blank_lines_are_skipped():
    text = "\n# a = b\n  a  =  c   # a = d\n\n"
    assert plan(text, shapes(a=(2,)), shapes(c=(2,))) == {"a": "c"}


def test_placeholders_are_filled_in():
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
def test_which_names_a_pattern_matches(pattern, name, fits):
    text = f"{pattern} = x"
    if fits:
        assert plan(text, {name: (1,)}, {"x": (1,)}) == {name: "x"}
    else:
        with pytest.raises(ValueError, match=f"no line matches the parameter '{name}'"):
            plan(text, {name: (1,)}, {"x": (1,)})


def test_the_first_matching_line_applies():
    text = "a.weight = special\na.* = a.*"
    found = plan(text, shapes(a__weight=(1,), a__bias=(1,)), {"special": (1,), "a.bias": (1,)})
    assert found == {"a.weight": "special", "a.bias": "a.bias"}


# Sections


def test_a_section_prefixes_the_names_below_it():
    text = "[down.{i} = blocks.{i}.left]\nqkv.* = concat(q.*, k.*)\nout = transpose(o)\n[]\na = a"
    targets = {"down.2.qkv.bias": (4,), "down.0.out": (2, 3), "a": (1,)}
    sources = {
        "blocks.2.left.q.bias": (2,),
        "blocks.2.left.k.bias": (2,),
        "blocks.0.left.o": (3, 2),
        "a": (1,),
    }
    assert plan(text, targets, sources) == {
        "down.2.qkv.bias": "concat(blocks.2.left.q.bias, blocks.2.left.k.bias)",
        "down.0.out": "transpose(blocks.0.left.o)",
        "a": "a",
    }
    # Outside the section, and in it without the prefix, the names mean nothing.
    for name in ("out", "down.out", "down.0.a"):
        with pytest.raises(ValueError, match=f"no line matches the parameter '{name}'"):
            plan(text, {name: (1,)}, {})


def test_a_header_ends_the_section_before_it():
    text = "[a = x]\nw = w\n\n# another\n[b = y]\nw = v"
    assert plan(text, {"a.w": (1,), "b.w": (1,)}, {"x.w": (1,), "y.v": (1,)}) == {"a.w": "x.w", "b.w": "y.v"}


def test_headers_in_a_row_share_the_lines_below_them():
    text = """
    [down.{i} = down_blocks.{i}]
    # Comments and blank lines between headers change nothing.

    [middle   = mid_block]
    w = w
      | concat(q, k)
    ignore mask : computed from the sizes
    """
    targets = {"down.3.w": (4,), "middle.w": (4,)}
    sources = {"down_blocks.3.w": (4,), "mid_block.q": (2,), "mid_block.k": (2,)}
    expected = {"down.3.w": "down_blocks.3.w", "middle.w": "concat(mid_block.q, mid_block.k)"}
    assert plan(text, targets, sources) == expected
    masks = {"down_blocks.3.mask": (1,), "mid_block.mask": (1,)}
    assert plan(text, targets, sources | masks) == expected
    assert mismatches(text, targets, sources | {"mask": (1,)}) == ["unexpected: mask, shape (1,)"]


def test_a_section_is_saved_under_its_own_names():
    text = "[a.{i} = x.{i}]\n[b = y]\nqk = concat(q, k) | qk"
    tensors = {"x.1.q": random(2), "x.1.k": random(2) + 1, "y.q": random(2) + 2, "y.k": random(2) + 3}
    state = {
        "a.1.qk": torch.cat([tensors["x.1.q"], tensors["x.1.k"]]),
        "b.qk": torch.cat([tensors["y.q"], tensors["y.k"]]),
    }
    saved = WeightMap(text).save(state)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_a_section_goes_with_the_optional_prefix():
    text = "optional_prefix net.\n[a = x]\nw = w"
    for name in ("x.w", "net.x.w"):
        assert plan(text, {"a.w": (1,)}, {name: (1,)}) == {"a.w": name}


# Alternatives, the optional prefix, and ignored tensors


def test_the_first_complete_alternative_is_taken():
    text = "a = new | concat(q, k) | old"
    targets = {"a": (4,)}
    assert plan(text, targets, {"new": (4,)}) == {"a": "new"}
    assert plan(text, targets, {"q": (2,), "k": (2,)}) == {"a": "concat(q, k)"}
    assert plan(text, targets, {"old": (4,)}) == {"a": "old"}
    # A second spelling in the same checkpoint is unexpected.
    assert mismatches(text, targets, {"new": (4,), "old": (4,)}) == ["unexpected: old, shape (4,)"]


def test_alternatives_on_lines_of_their_own():
    text = "a.* = new.*\n    | concat(q.*, k.*)  # since 2023\n\n    | old.* | oldest.*\nb = b"
    targets = {"a.w": (4,), "b": (1,)}
    found = [
        plan(text, targets, {"b": (1,), **sources})["a.w"]
        for sources in ({"new.w": (4,)}, {"q.w": (2,), "k.w": (2,)}, {"old.w": (4,)}, {"oldest.w": (4,)})
    ]
    assert found == ["new.w", "concat(q.w, k.w)", "old.w", "oldest.w"]


def test_the_most_complete_alternative_is_reported():
    text = "a = new | concat(q, k, v)"
    lines = mismatches(text, {"a": (6,)}, {"q": (2,), "v": (2,)})
    assert lines == ["missing: k (for the parameter a, shape (6,))"]


def test_the_optional_prefix():
    text = "optional_prefix model.\na = a\nb = b"
    targets = {"a": (1,), "b": (2,)}
    assert plan(text, targets, {"a": (1,), "b": (2,)}) == {"a": "a", "b": "b"}
    assert plan(text, targets, {"model.a": (1,), "model.b": (2,)}) == {"a": "model.a", "b": "model.b"}
    # An error uses the checkpoint's own names.
    lines = mismatches(text, targets, {"model.a": (3,), "model.b": (2,), "model.c": (1,)})
    assert lines[0].startswith("wrong shape: model.a")
    assert lines[1] == "unexpected: model.c, shape (1,)"


def test_a_tensor_with_and_without_the_prefix_is_a_duplicate():
    text = "optional_prefix model.\na = a"
    assert mismatches(text, {"a": (1,)}, {"a": (1,), "model.a": (1,)}) == ["duplicate: a and model.a"]


def test_ignored_tensors():
    text = "a = a\nignore position_ids : computed\nignore h.{i}.bias : a buffer"
    assert plan(
        text, {"a": (1,)}, {"a": (1,), "position_ids": (7,), "h.0.bias": (2,), "h.11.bias": (2,)}
    ) == {"a": "a"}
    lines = mismatches(text, {"a": (1,)}, {"a": (1,), "h.bias": (2,), "x.position_ids": (7,)})
    assert lines == ["unexpected: h.bias, shape (2,)", "unexpected: x.position_ids, shape (7,)"]


def test_two_stars_ignore_everything_below_a_name():
    text = "a = a\nignore flow.** : not used"
    sources = {"a": (1,), "flow.b": (1,), "flow.0.c.1.parametrizations.weight.original0": (1,)}
    assert plan(text, {"a": (1,)}, sources) == {"a": "a"}
    lines = mismatches(text, {"a": (1,)}, {"a": (1,), "flow": (1,), "flower.b": (1,), "my.flow.b": (1,)})
    assert [line.split(",")[0] for line in lines] == [
        f"unexpected: {n}" for n in ("flow", "flower.b", "my.flow.b")
    ]


def test_all_mismatches_are_in_one_error():
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
    lines = mismatches(text, targets, sources)
    assert lines == [
        "missing: x (for the parameter a, shape (1,))",
        "wrong shape: y gives (3,), the config expects (2,)",
        "wrong shape: concat(p, q): cannot concatenate shapes (2,), (3,)",
        "wrong shape: squeeze(s): (3, 2, 1, 3) is not a 1x1 convolution",
        "wrong shape: transpose(t) gives (3, 2), the config expects (2, 3)",
        "wrong shape: fold_weight_norm(g, v): gain (3, 1, 1) does not match direction (2, 3, 5)",
        "unexpected: extra, shape (8,)",
    ]


def test_of_many_mismatches_the_first_are_described():
    with pytest.raises(CheckpointError) as caught:
        WeightMap("a = a").plan({"a": (1,)}, {f"{i:03}\x1b[31m{'x' * 1000}": (1,) for i in range(1000)})
    message = str(caught.value)
    assert message.startswith("1001 of the checkpoint's tensors do not fit: missing: a (")
    assert message.endswith("; and 985 more")
    assert message.isprintable()
    assert len(message) < 3000


def test_a_scalar_in_place_of_a_matrix_is_a_wrong_shape():
    text = "a = concat(p, q)\nb = fold_weight_norm(g, v)\nc = squeeze(s)\nd = transpose(t)"
    lines = mismatches(text, dict.fromkeys("abcd", (2, 2)), dict.fromkeys(("p", "q", "g", "v", "s", "t"), ()))
    assert [line.split("(")[0] for line in lines] == [
        f"wrong shape: {operation}" for operation in ("concat", "fold_weight_norm", "squeeze", "transpose")
    ]


# Operations


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


def test_all_operations_are_tested_above():
    assert set(OPERATIONS) == {"copy", "concat", "squeeze", "transpose", "fold_weight_norm"}


def test_concat_keeps_the_order():
    tensors = {"q": torch.tensor([1.0]), "k": torch.tensor([2.0]), "v": torch.tensor([3.0])}
    assert apply(Recipe("concat", ("q", "k", "v")), tensors.__getitem__).tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prepare", [torch.clone, torch.t, nn.Parameter, lambda x: x.to("meta")])
def test_concat_is_torch_cat(dtype, prepare):
    parts = [prepare(random(4, 4).to(dtype)) for _ in range(3)]
    joined = apply(Recipe("concat", ("q", "k", "v")), dict(zip("qkv", parts, strict=True)).__getitem__)
    expected = torch.cat(parts)
    assert (joined.dtype, joined.device) == (dtype, expected.device)
    assert joined.is_contiguous()
    assert joined.is_meta or torch.equal(joined, expected)


def test_concat_promotes_types_as_torch_cat_does():
    parts = {"q": torch.ones(2), "k": torch.ones(2, dtype=torch.float16)}
    assert apply(Recipe("concat", ("q", "k")), parts.__getitem__).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_norm_equals_pytorchs(dtype):
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


# Loading and saving


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


# The maps in the package


def test_every_stage_has_a_map():
    stages = {name.split(".")[0] for name in SHIPPED}
    assert stages == {
        "text_encoder",
        "text_encoder_2",
        "projection_model",
        "language_model",
        "unet",
        "vae",
        "vocoder",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_no_line_is_longer_than_110_columns(name):
    lines = (ROOT / "weights_map" / f"{name}.map").read_text().splitlines()
    assert [line for line in lines if len(line) > 110] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_map_can_be_saved_and_gives_reasons(name):
    shipped = weight_map(name)
    assert shipped.rules
    for pattern, reason in shipped.ignored:
        assert len(reason.split()) >= 3, f"{pattern.pattern}: '{reason}' is not much of a reason"
    for rule in shipped.rules:
        # Saving writes the first alternative, whose inverse must be exact.
        assert rule.alternatives[0].operation != "fold_weight_norm"


def test_a_missing_map():
    with pytest.raises(FileNotFoundError, match=r"weights_map/nothing\.map is missing"):
        weight_map("nothing")
