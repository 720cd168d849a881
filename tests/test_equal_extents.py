"""Extents that coincide change nothing: ranks are told apart by what walks them, not by how long they are.

Every family at shapes where rows, length and dims are equal makes as many regions, kernels and passes as at shapes
where they differ, and is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memcomp
from memcomp.capture import find_regions
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.traversal import passes
from memcomp.ir.verify import verify
from memcomp.models.families import Family
from memcomp.models.families.attention import DIM
from memcomp.models.families.attention import FAMILIES as ATTENTION
from memcomp.models.families.reductions import FAMILIES as REDUCTIONS
from memcomp.models.families.reductions import HEADS, MODEL
from memcomp.passes import PIPELINE
from memcomp.passes.canonicalize import canonicalize
from memcomp.stations import rewrite
from tests.families import LENGTH, ROWS, right

OPTIONS: dict[str, Any] = {"rest": "eager", "strict": True, "chains": "all"}
OUTPUTS = 24  # of the products behind norms
SQUARE = {"attention": [(DIM, DIM), (ROWS, DIM), (DIM, LENGTH), (LENGTH, LENGTH)],
          "reductions": [(OUTPUTS, OUTPUTS), (MODEL, MODEL), (ROWS, OUTPUTS), (ROWS, MODEL), (LENGTH, LENGTH),
                         (HEADS, HEADS), (2 * HEADS, 2 * HEADS)]}

pytestmark = pytest.mark.usefixtures("fresh", "no_grad")


def forms(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> list[tuple[int, list[int]]]:
    """Per region: kernels, and the passes of the derived form over each rank of each input."""
    found: list[Program] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.extend(r.program for r in find_regions(gm, "all")[0])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=False)(*args)
    names = PIPELINE[:PIPELINE.index("fuse") + 1]
    made = [rewrite(p, observe=lambda name, value: None, names=names) for p in found]
    return [(len(p.mapping.groups), sorted(n for (t, _), n in passes(p).items()
                                           if t in {x.name for x in p.cascade.inputs()})) for p in made]


def cases() -> list[Any]:
    return [pytest.param(f, SQUARE[kind], id=f.name) for kind, some in
            (("attention", ATTENTION), ("reductions", REDUCTIONS)) for f in some]


@pytest.mark.slow
@pytest.mark.parametrize("family,shapes", cases())
def test_families(family: Family, shapes: list[tuple[int, int]]) -> None:
    apart = forms(family.fn, family.inputs(ROWS, LENGTH, torch.float32))
    for rows, length in shapes:
        if family.name == "documents" and rows > length:
            continue  # its queries are the last keys
        args = family.inputs(rows, length, torch.float32)
        assert forms(family.fn, args) == apart, (rows, length)
        memcomp.reset()
        right(family, args, **OPTIONS)


# -- layers whose sizes are their own ----------------------------------------------------------------------------------


def norm(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, (x.shape[-1],), gain, 1e-6), w)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def memory(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(F.normalize(x, dim=-1) @ keys.T, -1) @ values


def group_norm(x: Tensor, gain: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], gain, bias) @ w.T


# the shapes: sizes that differ, and sizes of which some are equal
LAYERS: list[tuple[Callable[..., Tensor], str, str, list[str]]] = [
    (norm, "PM M OM", "P=33 M=40 O=24", ["P=33 M=40 O=40", "P=40 M=40 O=40"]),
    (norm, "BPM M OM", "B=2 P=33 M=40 O=24", ["B=2 P=33 M=40 O=40", "B=40 P=40 M=40 O=40"]),
    (attention, "BHPE BHME BHMF", "B=2 H=3 P=33 M=40 E=16 F=24",
     ["B=2 H=2 P=64 M=64 E=64 F=64", "B=8 H=8 P=8 M=8 E=8 F=8", "B=16 H=3 P=33 M=40 E=16 F=16"]),
    (attention, "BHPE BHME BHMF", "B=2 H=3 P=1 M=40 E=16 F=24",
     ["B=2 H=3 P=1 M=64 E=64 F=64", "B=16 H=16 P=1 M=16 E=16 F=16"]),
    (linear_attention, "BHPE BHME BHMF", "B=2 H=3 P=33 M=40 E=16 F=24", ["B=2 H=3 P=32 M=32 E=16 F=24"]),
    (memory, "PE ME MF", "P=33 M=40 E=16 F=24", ["P=32 M=32 E=32 F=32", "P=33 M=16 E=16 F=16"]),
    (group_norm, "PGM G G OM", "P=33 G=6 M=40 O=24", ["P=40 G=40 M=40 O=40", "P=33 G=24 M=40 O=24"]),
]


def tensors(shapes: str, sizes: str) -> tuple[Tensor, ...]:
    """Standard normal tensors: "PM M" of "P=3 M=4" are one of (3, 4) and one of (4,)."""
    size = {s[0]: int(s[2:]) for s in sizes.split()}
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn([size[x] for x in word], generator=random) for word in shapes.split())


@pytest.mark.parametrize("fn,shapes,differ,equal", LAYERS, ids=lambda x: getattr(x, "__name__", None))
def test_layers(fn: Callable[..., Tensor], shapes: str, differ: str, equal: list[str]) -> None:
    apart = forms(fn, tensors(shapes, differ))
    for sizes in equal:
        args = tensors(shapes, sizes)
        assert forms(fn, args) == apart, sizes


@pytest.mark.parametrize("fn,shapes,differ,equal", [x for x in LAYERS if x[0] in (norm, linear_attention)],
                         ids=lambda x: getattr(x, "__name__", None))
def test_square_layers_are_right(fn: Callable[..., Tensor], shapes: str, differ: str, equal: list[str]) -> None:
    report = memcomp.check(fn, *tensors(shapes, equal[0]), **OPTIONS)
    assert report.ok, report


# -- the rewrite -------------------------------------------------------------------------------------------------------


def test_a_rank_of_two_parts_is_joined_where_it_walks_the_same() -> None:
    """The features under the norm are those that the product sums; the outputs only happen to be as many."""
    program = parse("""program p
rank P
rank M = {0}
rank E = {0}
in X[P, M]: f32
in W[M, E]: f32
out O[P, M]: f32
R[p] = sum{{m}} square(X[p, m])
O[p, m] = sum{{e}} X[p, e] * rsqrt(R[p]) * W[m, e]
""".format(5))
    new = canonicalize(program)
    verify(new)
    assert canonicalize(new) is new
    first, last = new.cascade.einsums
    assert first.reduce is not None and last.reduce is not None and first.reduce.over == last.reduce.over
    x, w = (t.double().numpy() for t in tensors("PM MM", "P=3 M=5"))
    want, got = (interpret(p, {"X": x, "W": w})["O"] for p in (program, new))
    assert abs(want - got).max() < 1e-12


def test_rows_and_sums_of_one_name_are_two_ranks() -> None:
    program = parse("""program p
rank P
rank M
in X[P, M]: f32
in Y[P, M]: f32
out O[P]: f32
R[m] = sum{p} X[p, m]
O[p] = sum{m} Y[p, m] * R[m]
""")
    new = canonicalize(program)
    verify(new)
    assert canonicalize(new) is new
    first, last = new.cascade.einsums
    assert first.reduce is not None and not set(first.reduce.over) & set(last.space())
    x, y = (t.double().numpy() for t in tensors("PM PM", "P=3 M=5"))
    want, got = (interpret(p, {"X": x, "Y": y})["O"] for p in (program, new))
    assert (want == got).all()
