"""Operators of the user's own: they derive by stated laws, run on kernels, and wrong statements are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memcomp
from memcomp.capture.find import find_regions
from memcomp.capture.torch_reader import capture
from memcomp.ir import ops
from memcomp.ir.errors import OptionError, ParseError
from memcomp.ir.expr import Const, Var, call
from memcomp.ir.interpret import interpret
from memcomp.ir.laws import counterexample, named
from memcomp.ir.ops import Op
from memcomp.ir.register import definitions, expanded, register
from memcomp.ir.text import parse
from memcomp.passes.canonicalize import canonicalize
from memcomp.passes.reduce_passes import reduce_passes, refusals
from tests.test_reduce_passes import same

X = Var("x")
LEAKY = call("where", call("lt", X, 0.0), X * 0.125, X)
RAMP = call("min", call("max", X * 0.25 + 0.5, 0.0), 1.0)


pytestmark = pytest.mark.usefixtures("operators")


def leaky(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, 0.125 * x, x)


def ramp(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(0.25 * x + 0.5, 0.0, 1.0)


def row(name: str, definition: Any = LEAKY, **laws: Any) -> Op:
    return Op(name, 1, np.abs, definition=definition, **laws)


# -- the algebra ------------------------------------------------------------------------------------------------------

CHAIN = """program chain
rank P
rank M
in X[P, M]: f32
in V[M]: f32
out L[P]: f32
out O[P]: f32
G[p] = max{{m}} abs(X[p, m])
L[p] = max{{m}} {0}(X[p, m] - G[p])
O[p] = sum{{m}} {0}(X[p, m] / G[p]) * V[m]
"""
WEIGHTS = """program weights
rank P
rank M
in X[P, M]: f32
in V[M]: f32
out O[P]: f32
GM[p] = max{{m}} {0}(X[p, m])
W[p, m] = exp({0}(X[p, m]) - GM[p])
SW[p] = sum{{m}} W[p, m]
O[p] = sum{{m}} W[p, m] / SW[p] * V[m]
"""


def test_a_registered_operator_derives_by_its_laws_and_not_without() -> None:
    register(row("leaky", monotone=("inc",), strict=True, degree=1.0))
    register(row("mute"))
    good, bad = (reduce_passes(parse(CHAIN.format(n)), tile=(4,)) for n in ("leaky", "mute"))
    assert refusals(good) == () and {"leaky.degree", "leaky.monotone"} <= set(named(good.proofs))
    assert {r.where for r in refusals(bad)} == {"L over M", "O over M"}
    assert all("mute" in r.why for r in refusals(bad))
    rng = np.random.default_rng(0)
    x = {"X": rng.standard_normal((3, 11)), "V": rng.standard_normal(11)}
    want = interpret(parse(CHAIN.format("leaky")), x)
    for n, program in (("leaky", good), ("leaky", expanded(good)), ("mute", bad)):
        got = interpret(program, x)
        assert all(same(want[k], got[k]) for k in want), n
    np.testing.assert_allclose(want["L"], np.max(np.where((d := x["X"] - abs(x["X"]).max(1, keepdims=True)) < 0,
                                                          0.125 * d, d), axis=1))


def test_a_stated_bound_makes_the_reference_unnecessary() -> None:
    register(row("ramp", RAMP, monotone=("inc",), range=(0.0, 1.0)))
    register(row("loose", RAMP, monotone=("inc",)))
    bounded, loose = (str(reduce_passes(parse(WEIGHTS.format(n)), tile=(4,))) for n in ("ramp", "loose"))
    assert "max{" not in bounded and "max{" in loose
    assert "M: 3 -> 1 passes" in bounded and "M: 3 -> 1 passes" in loose


def test_the_same_law_moves_a_reduction_through_a_registered_exponential_and_an_additive_one() -> None:
    register(Op("doubling", 1, np.exp2, hom=("add", "mul"), monotone=("inc",), positive=True, range=(0.0, ops.INF),
                definition=call("exp2", X)))
    register(row("thrice", X * 3.0, hom=("add", "add"), monotone=("inc",)))
    text = """program t
rank P
rank M
in X[P, M]: f32
out O[P]: f32
out T[P]: f32
G[p] = max{m} X[p, m]
O[p] = sum{m} doubling(X[p, m] - G[p])
T[p] = sum{m} thrice(X[p, m] - 2.0*G[p])
"""
    new = reduce_passes(parse(text), tile=(4,))
    assert refusals(new) == () and {"doubling.hom", "thrice.hom"} <= set(named(new.proofs))
    x = {"X": np.random.default_rng(1).standard_normal((3, 10)) * 50}
    want, got = interpret(parse(text), x), interpret(new, x)
    assert all(same(want[k], got[k]) for k in want)


# -- refusals of registrations ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("laws", "says"), [
    ({"monotone": ("dec",)}, "is decreasing"), ({"degree": 2.0}, "degree 2"), ({"range": (0.0, 9.0)}, "lies in"),
    ({"positive": True}, "is positive"), ({"hom": ("add", "mul")}, r"takes \+ to \*"),
    ({"hom": ("mul", "mul")}, r"takes \* to \*"), ({"linear": ((0,),)}, "linear"), ({"strict": True}, "strictly"),
    ({"limits": ((-ops.INF, 0.0),)}, r"\(-inf\) = 0"),
])
def test_a_wrong_law_is_refused_with_numbers(laws: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        register(row("leaky", **laws))
    assert "leaky" in caught.value.where or laws == {"strict": True}
    assert "leaky" not in ops.OPS


@pytest.mark.parametrize(("bad", "says"), [
    (Op("exp", 1, np.exp, definition=LEAKY), "is an operator of the table"),
    (row("Leaky"), "cannot name"), (row("where"), "cannot name|is an operator"), (row("two words"), "cannot name"),
    (Op("four", 4, np.exp), "takes 4 arguments"), (row("leaky", monotone=("inc", "inc")), "does not have"),
    (row("leaky", call("unheard", X)), "unknown operator 'unheard'"), (row("leaky", Var("q")), "reads q"),
    (row("leaky", domain="pos"), "outside the domain"), (row("leaky", monotone=("up",)), "monotone = "),
    (row("leaky", hom=("add", "and")), "hom = "),
])
def test_a_bad_registration_is_refused(bad: Op, says: str) -> None:
    before = dict(ops.OPS)
    with pytest.raises(OptionError, match=says):
        register(bad)
    assert ops.OPS == before


def test_a_name_means_one_function() -> None:
    first = register(row("leaky", monotone=("inc",)))
    assert register(row("leaky", monotone=("inc",))) is first
    for other in (row("leaky"), row("leaky", RAMP, monotone=("inc",))):
        with pytest.raises(OptionError, match="already registered as where"):
            register(other)


def test_the_definition_and_the_laws_enter_the_digest() -> None:
    digests = set()
    for definition, laws in ((LEAKY, {}), (RAMP, {}), (RAMP, {"monotone": ("inc",)})):
        ops.OPS.pop("f", None)
        register(row("f", definition, **laws))
        program = parse(WEIGHTS.format("f"))
        assert len(definitions(program)) == 1
        digests.add(program.digest)
    ops.OPS.pop("g", None)
    register(row("g", call("f", X) * Const(2.0)))
    assert len(definitions(parse(WEIGHTS.format("g")))) == 2  # what it is made of counts, too
    assert len(digests) == 3
    assert definitions(parse(WEIGHTS.format("exp"))) == ()


def test_a_program_with_an_unknown_operator_does_not_parse() -> None:
    with pytest.raises(ParseError, match="unknown operator 'leaky'"):
        parse(CHAIN.format("leaky"))


# -- torch ------------------------------------------------------------------------------------------------------------

def scored(score: Any) -> Any:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        s = q @ k.mT
        return score(s / s.abs().amax(-1, keepdim=True)) @ v

    return attention


def program_of(fn: Any, *args: Any) -> Any:
    (region,), _ = find_regions(capture(fn, *args))
    return canonicalize(region.program)


def tensors(*shape: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, e, generator=g) for n, e in zip(shape[::2], shape[1::2], strict=True)]


def test_torch_compile_runs_it_in_one_pass() -> None:
    own = memcomp.register(leaky, monotone="inc", degree=1.0)
    q, k, v = tensors(5, 8, 37, 8, 37, 8)
    program = program_of(scored(own), q, k, v)
    assert "leaky(" in str(program)
    derived = reduce_passes(program)
    assert refusals(derived) == () and "leaky.degree" in named(derived.proofs)
    memcomp.reset()
    got = torch.compile(scored(own), backend="memcomp")(q, k, v)
    assert memcomp.stats()["regions"] == 1 and memcomp.stats()["kernels"] == 1
    torch.testing.assert_close(got, scored(leaky)(q, k, v))


def test_without_laws_it_is_refused_by_name_and_still_right() -> None:
    own = memcomp.register(leaky, name="mute")
    q, k, v = tensors(5, 8, 37, 8, 37, 8)
    (why,) = refusals(reduce_passes(program_of(scored(own), q, k, v)))
    assert "mute" in why.why
    torch.testing.assert_close(torch.compile(scored(own), backend="memcomp")(q, k, v), scored(leaky)(q, k, v))


def test_a_bounded_score_in_attention_and_its_gradient() -> None:
    own = memcomp.register(ramp, monotone="inc", range=(0.0, 1.0))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(own(q @ k.mT), -1) @ v

    q, k, v = tensors(5, 8, 37, 8, 37, 8)
    derived = str(reduce_passes(program_of(attention, q, k, v)))
    assert "max{" not in derived and "3 -> 1 passes" in derived
    want = [x.clone().requires_grad_() for x in (q, k, v)]
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.compile(attention, backend="memcomp")(*mine)
    torch.testing.assert_close(out, attention(*want))
    attention(*want).sum().backward()
    out.sum().backward()
    for a, b in zip(mine, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_decorator_and_two_arguments() -> None:
    @memcomp.register(monotone=("inc", "dec"))
    def gap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(x > y, x - y, 0.5 * (x - y))

    assert ops.OPS["gap"].arity == 2 and counterexample(ops.OPS["gap"]) is None
    x, y = np.array([1.0, 3.0]), np.array([2.0, 1.0])
    np.testing.assert_allclose(ops.OPS["gap"].numpy(x, y), [-0.5, 2.0])


@pytest.mark.parametrize(("fn", "says"), [
    (lambda x: x - x.mean(), "point by point"), (lambda x: x.flip(0), "point by point|cannot be read"),
    (lambda x: x if x.sum() > 0 else -x, "cannot be traced"), (lambda x: torch.special.i0(x), "cannot be read"),
    (lambda *x: x[0], "one by one"),
])
def test_what_cannot_be_read_is_refused(fn: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        memcomp.register(fn, name="strange")
    assert "strange" not in ops.OPS
