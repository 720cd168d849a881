"""simplify is sound at every point the ranges allow, idempotent, and decides what the rewrites rely on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call
from memcomp.ir.ops import OPS
from memcomp.ir.simplify import bounds, linear, proves, simplify

j, g, m, m0, m1, p = (Var(n) for n in ("j", "g", "m", "m0", "m1", "p"))
G, J, M, M0, M1, P = (Size(n) for n in ("G", "J", "M", "M0", "M1", "P"))
RANGES = {"j": (0, J), "g": (0, G), "m": (0, M), "m0": (0, M0), "m1": (0, M1), "p": (0, P)}


class Undefined(Exception):
    """A division by zero."""


def value(e: Expr, env: Mapping[str, int], data: Mapping[tuple[int, ...], float]) -> float | int | bool:
    if isinstance(e, Const):
        return e.value
    if isinstance(e, Var):
        return env[e.name]
    if isinstance(e, Size):
        return env[e.rank]
    if isinstance(e, Access):
        return data[tuple(int(value(i, env, data)) % 7 for i in e.index)]
    args = [value(a, env, data) for a in e.args]
    if e.op in ("floordiv", "mod", "ceildiv") and args[1] == 0:
        raise Undefined
    return OPS[e.op].numpy(*args).item()


def index_exprs() -> st.SearchStrategy[Expr]:
    leaf = st.one_of(
        st.integers(-9, 9).map(Const), st.sampled_from([Var(v) for v in "abc"]),
        st.sampled_from([Size("A"), Size("N")]), st.sampled_from([Access("t", (Var("a"),)), Access("t", (Const(3),))]),
    )

    def grow(kids: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        two = st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "ceildiv", "max", "min"])
        divisor = st.one_of(st.integers(1, 6).map(Const), st.sampled_from([Size("A"), Size("N")]))
        return st.one_of(
            st.builds(lambda o, x, y: Call(o, (x, y)), two, kids, kids),
            st.builds(lambda o, x, y: Call(o, (x, y)), st.sampled_from(["floordiv", "mod", "ceildiv"]), kids, divisor),
            st.builds(lambda x: Call("neg", (x,)), kids), st.builds(lambda x: Call("abs", (x,)), kids),
        )

    return st.recursive(leaf, grow, max_leaves=8)


def conditions() -> st.SearchStrategy[Expr]:
    atom = st.builds(lambda o, x, y: Call(o, (x, y)), st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]),
                     index_exprs(), index_exprs())

    def grow(kids: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.one_of(st.builds(lambda o, x, y: Call(o, (x, y)), st.sampled_from(["and", "or"]), kids, kids),
                         st.builds(lambda x: Call("not", (x,)), kids))

    return st.recursive(atom, grow, max_leaves=4)


# a in a constant range with negatives, b below a size, c unbounded, A and N any sizes (N at most 9)
FREE = {"a": (-3, 6), "b": (0, Size("N")), "N": (0, 10)}
POINTS = st.fixed_dictionaries({"a": st.integers(-3, 5), "c": st.integers(-20, 20), "A": st.integers(0, 6),
                                "N": st.integers(1, 9), "b": st.integers(0, 8)})
DATA = st.lists(st.integers(-8, 8), min_size=7, max_size=7).map(lambda xs: {(i,): x for i, x in enumerate(xs)})


@settings(max_examples=400, deadline=None)
@given(e=st.one_of(index_exprs(), conditions()), envs=st.lists(POINTS, min_size=4, max_size=4), data=DATA)
def test_same_value_at_every_point(e: Expr, envs: list[dict[str, int]], data: dict[tuple[int, ...], float]) -> None:
    s = simplify(e, FREE, index=True)
    assert simplify(s, FREE, index=True) == s, "not idempotent"
    low, high = bounds(e, FREE, integers=("t",))
    for env in envs:
        env["b"] %= env["N"]
        try:
            want = value(e, env, data)
        except Undefined:
            continue
        got = value(s, env, data)
        assert got == want and type(got) is type(want), (e, s, env)
        if not isinstance(want, bool):
            least, most = (b if b is None or isinstance(b, int) else value(b, env, data) for b in (low, high))
            assert (least is None or least <= want) and (most is None or want <= most), (e, low, high, env)


def reals() -> st.SearchStrategy[Expr]:
    leaf = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, 0, 1]).map(Const),
                     st.just(Access("x", (Const(0),))), st.just(Access("x", (Const(1),))), st.just(Var("a")))
    ops = st.sampled_from(["add", "sub", "mul", "div", "max", "min"])
    return st.recursive(leaf, lambda k: st.one_of(
        st.builds(lambda o, x, y: Call(o, (x, y)), ops, k, k),
        st.builds(lambda o, x: Call(o, (x,)), st.sampled_from(["neg", "exp", "abs", "real"]), k),
        st.builds(lambda c, x, y: Call("where", (Call("lt", (c, Const(0.0))), x, y)), k, k, k)), max_leaves=6)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(e=reals(), a=st.integers(-3, 3), x=st.lists(st.floats(width=32), min_size=2, max_size=2))
def test_real_expressions_keep_their_exact_value(e: Expr, a: int, x: list[float]) -> None:
    data = {(0,): x[0], (1,): x[1]}
    want = value(e, {"a": a}, data)
    got = value(simplify(e), {"a": a}, data)
    assert got == want or (got != got and want != want)


def test_laws_the_rewrites_rely_on() -> None:
    split = j * G + g
    assert simplify(split // G, RANGES) == j and simplify(split % G, RANGES) == g
    assert simplify((split // G) * G + split % G, RANGES) == simplify(split, RANGES)
    assert simplify((m // M0) * M0 + m % M0, RANGES) == m
    assert simplify((m // 32) * 16 + m // 2 % 16) == simplify(m // 2)
    assert simplify((j * 3 + g) // 3, {"g": (0, 3)}) == j
    assert simplify(((j * 3 + g) * 4 + p) // 12, {"g": (0, 3), "p": (0, 4)}) == j
    assert simplify(call("ceildiv", M * M0, M0), RANGES) == M
    assert simplify(m // 1) == m and simplify(m % 1) == Const(0)
    assert simplify((m // 4) // 2) == simplify(m // 8)
    assert simplify((m % 12) % 4) == simplify(m % 4)
    assert simplify(call("lt", m, M), RANGES) == Const(True)
    assert simplify(call("lt", m1 * M0 + m0, M1 * M0), RANGES) == Const(True)
    assert simplify(call("lt", m1 * 64 + m0, 512), {"m1": (0, 8), "m0": (0, 64)}) == Const(True)
    assert simplify(call("lt", m1 * 64 + m0, 500), {"m1": (0, 8), "m0": (0, 64)}) != Const(True)
    assert simplify(call("ge", p, m)) == simplify(call("le", m, p)) == simplify(call("lt", m, p + 1))
    assert simplify(call("le", 0, p - m)) == call("le", m, p)
    assert simplify(call("le", m, p), {"m": (0, p + 1)}) == Const(True)
    assert simplify(call("or", call("lt", m, p), call("ge", m, p))) == Const(True)


def test_only_what_is_known_to_be_an_integer_is_reordered() -> None:
    x, y = Access("x", (m,)), Access("y", (m,))
    assert simplify(x + y - x) == x + y - x
    assert simplify(call("eq", x, x)) == call("eq", x, x)  # NaN is not equal to itself
    assert simplify(call("eq", x, x), integers=("x",)) == Const(True)
    assert simplify(x * 0.0) == x * 0.0
    assert simplify(call("where", call("lt", m, M), x * 1.0, 0.0), RANGES) == x
    gather = Access("k", (Access("page", (m,)) - Access("page", (m,)) + 2 * j - j,))
    assert simplify(gather) == Access("k", (j,))
    assert simplify(call("lt", Var("t"), Access("len", (j,))), {"t": (0, Access("len", (j,)))}) == Const(True)


def test_types_of_constants_survive() -> None:
    assert simplify(call("add", 1, 2)) == Const(3) and simplify(call("add", 1, 2.0)) == Const(3.0)
    assert simplify(call("div", 1, 2)) == Const(0.5) and simplify(call("lt", 1, 2)) == Const(True)
    assert simplify(m * 1.0) == m * 1.0, "an integer times 1.0 is a real"
    assert simplify(call("max", Access("x", ()), -math.inf)) == Access("x", ())


def test_linear_names_every_term() -> None:
    assert linear(m1 * 64 + m0 + 3 - m0 * 2) == {m1: 64, m0: -1, None: 3}
    assert linear(m1 * M0 + m0) == {m1 * M0: 1, m0: 1}
    assert linear(Const(0)) == {} and linear(Const(0.5)) is None and linear(Access("x", (m,))) is None


def test_bounds_are_tight_where_terms_are_independent() -> None:
    box = {"m1": (0, 8), "m0": (0, 64), "p": (-2, 3)}
    for e in (m1 * 64 + m0, m0 - m1 * 3, p * -2 + m1, (m1 * 64 + m0) // 32, m0 % 5):
        values = [value(e, {"m1": a, "m0": b, "p": c}, {}) for a, b, c in
                  itertools.product(range(8), range(64), range(-2, 3))]
        assert bounds(e, box) == (min(values), max(values))
    assert bounds(m1 * M0 + m0, RANGES)[0] == 0
    assert simplify(call("eq", bounds(m1 * M0 + m0, RANGES)[1], M0 * M1 - 1)) == Const(True)


def test_nothing_is_said_about_empty_or_unknown_ranges() -> None:
    assert not proves(call("lt", 0, M), RANGES), "M may be 0 where no m lives"
    assert proves(call("lt", 0, M + 1), RANGES)
    assert not proves(call("lt", m, M)) and not proves(call("le", 0, m))
