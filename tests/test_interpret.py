"""interpret against a point-by-point evaluator, on random programs and on every construct written by hand."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from memcomp.ir import statement
from memcomp.ir.cascade import Cascade, Einsum, Knob
from memcomp.ir.errors import InputError, VerifyError
from memcomp.ir.expr import Access, Const, Expr, Size, Var, variables
from memcomp.ir.interpret import interpret
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.program import Program
from memcomp.ir.rounding import epsilon, round_to
from memcomp.ir.text import parse
from tests.programs import arrays, programs
from tests.references import CASES

Arrays = dict[str, np.ndarray[Any, Any]]


def program(text: str) -> Program:
    return parse("program t on cpu\n" + text)


class Points:
    """One point after another, as the definition says; inputs and results as dicts of elements."""

    def __init__(self, c: Cascade, inputs: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> None:
        self.c, self.sizes = c, dict(sizes or {})
        self.data: dict[str, dict[tuple[int, ...], Any]] = {}
        for t in c.inputs():
            x = np.asarray(inputs[t.name])
            self.data[t.name] = {i: x[i].item() for i in np.ndindex(x.shape)}
            self.data.setdefault(t.name + "'", dict(self.data[t.name]))
            for r, n in zip(t.ranks, x.shape, strict=True):
                if c.rank(r).extent is None:
                    self.sizes[r] = n
        self.run([*c.einsums], {})

    def extent(self, rank: str, env: Mapping[str, int]) -> int:
        x = self.c.rank(rank).extent
        if x is None:
            return self.sizes[rank]
        return x.choices[0] if isinstance(x, Knob) else int(self.value(x, env))

    def value(self, e: Expr, env: Mapping[str, int]) -> Any:
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Var):
            return env[e.name]
        if isinstance(e, Size):
            return self.extent(e.rank, env)
        if isinstance(e, Access):
            t = self.c.declared(e.tensor.removesuffix("'"))
            at = tuple(int(self.value(i, env)) for i in e.index)
            return self.data.get(e.tensor, {}).get(at, t.empty if t else 0.0)
        args = [self.value(a, env) for a in e.args]
        if OPS[e.op].result != "bool" and e.op not in ("where", "not"):
            args = [int(a) if isinstance(a, bool) else a for a in args]
        return OPS[e.op].numpy(*args).item()

    def space(self, names: list[str], env: dict[str, int]) -> Iterator[dict[str, int]]:
        if not names:
            yield env
            return
        v = next(v for v in names if self.ready(v, names))
        for i in range(self.extent(v.upper(), env)):
            yield from self.space([n for n in names if n != v], {**env, v: i})

    def ready(self, v: str, names: list[str]) -> bool:
        x = self.c.rank(v.upper()).extent
        return x is None or isinstance(x, Knob) or not variables(x) & set(names)

    def run(self, todo: list[Einsum], env: dict[str, int]) -> None:
        at = 0
        while at < len(todo):
            own = [v for v in self.loops(todo[at]) if v not in env]
            if not own:
                self.statement(todo[at], env)
                at += 1
                continue
            ends = {v: next((k for k in range(at, len(todo)) if v not in self.loops(todo[k])), len(todo)) for v in own}
            v = max(own, key=lambda w: ends[w])
            for i in range(self.extent(v.upper(), env)):
                self.run(todo[at:ends[v]], {**env, v: i})
            at = ends[v]

    def loops(self, e: Einsum) -> list[str]:
        own = {v for o in e.outs for i in o.index for v in variables(i)}
        return [r.var for r in self.c.ranks if r.iterative and r.var in own]

    def statement(self, e: Einsum, env: dict[str, int]) -> None:
        over = list(e.reduce.over) if e.reduce else []
        order = e.out.index[-1].name if e.reduce and e.reduce.monoid == "topk" else None  # type: ignore[union-attr]
        outer = [v for v in e.space() if v not in over and v not in env and v != order]
        for point in self.space(outer, dict(env)):
            if e.reduce is None:
                if e.guard is None or self.value(e.guard, point):
                    self.put(e.out, point, self.value(e.body, point))
                continue
            terms = []
            extents = [self.extent(v.upper(), point) for v in over]
            for inner in self.space(over, point):
                flat = 0
                for v, n in zip(over, extents, strict=True):
                    flat = flat * n + inner[v]
                live = e.guard is None or bool(self.value(e.guard, inner))
                terms.append((flat, self.value(e.body, inner) if live else None))
            self.reduce(e, point, terms, order)

    def reduce(self, e: Einsum, point: dict[str, int], terms: list[tuple[int, Any]], order: str | None) -> None:
        assert e.reduce is not None
        monoid = MONOIDS[e.reduce.monoid]
        if monoid.outs == 2:
            sign = 1 if monoid.name == "argmin" else -1
            pairs = [(monoid.identity if x is None else x, i) for i, x in terms]
            ranked = sorted(pairs, key=lambda p: (sign * p[0], p[1]))
            for k in range(self.extent(order.upper(), point) if order else 1):
                at = {**point, order: k} if order else point
                best = ranked[k] if k < len(ranked) else None if order else (monoid.identity, 0)
                if best is not None:
                    for o, x in zip(e.outs, best, strict=True):
                        self.put(o, at, x)
            return
        total: Any = bool(monoid.identity) if monoid.name in ("and", "or") else monoid.identity
        for _, x in sorted(terms, key=lambda p: p[0]):
            if x is not None:
                total = OPS[monoid.join].numpy(total, x).item()
        self.put(e.out, point, total)

    def put(self, o: Access, env: dict[str, int], x: Any) -> None:
        self.data.setdefault(o.tensor, {})[tuple(int(self.value(i, env)) for i in o.index)] = x

    def check(self, got: Arrays) -> None:
        for t in self.c.outputs():
            data = self.data.get(t.name + "'" if t.role == "state" else t.name, {})
            want = np.full(got[t.name].shape, t.empty)
            for at, x in data.items():
                if all(0 <= a < n for a, n in zip(at, want.shape, strict=True)):
                    want[at] = x
            scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))
            np.testing.assert_allclose(got[t.name].astype(float), want, rtol=1e-9, atol=1e-9 * scale, err_msg=t.name)


def agree(p: Program, inputs: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> Arrays:
    got = interpret(p, inputs, sizes)
    with np.errstate(all="ignore"):
        Points(p.cascade, inputs, sizes).check(got)
    return got


@pytest.fixture(params=["whole", "blocks", "contractions"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same meaning whether spaces are cut in blocks of 7 points, or sums of products go through matmul."""
    if request.param == "blocks":
        monkeypatch.setattr(statement, "POINTS", 7)
    if request.param == "contractions":
        monkeypatch.setattr(statement, "SMALL", 0)
        monkeypatch.setattr(statement, "FACTOR", 11)


@pytest.mark.usefixtures("ways")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=50, deadline=None)
@given(p=programs())
def test_random_programs(p: Program) -> None:
    agree(p, arrays(p))


@pytest.mark.parametrize("name", sorted(CASES))
def test_written_cases(name: str) -> None:
    inputs, _ = CASES[name](np.random.default_rng(1))
    agree(parse((Path(__file__).parent / "cases" / f"{name}.mc").read_text()), inputs)


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.usefixtures("ways")
def test_ragged_nested_gather_and_scatter() -> None:
    p = program("""rank B
rank N <= 9
rank S
rank G = 4
rank E = 3
rank T = len[b] <= 8
rank R
in len[B]: i64
in page[B, S]: i64
state pool[N, G, E]: f32
in new[B, E]: f32
in q[B, E]: f32
out o[B, E]: f32
out tall[B, T]: f32
pool'[page[b, (len[b]-1)//4], (len[b]-1)%4, e] = new[b, e] where len[b] > 0
tall[b, t] = sum{e} q[b, e] * pool'[page[b, t//4], t%4, e]
o[b, e] = sum{t} tall[b, t] * pool'[page[b, t//4], t%4, e] where t >= 1
""".replace("rank R\n", ""))
    inputs = {"len": [5, 0, 8, 1], "page": [[3, 7], [-1, -1], [0, 1], [8, -1]], "pool": normal(9, 4, 3),
              "new": normal(4, 3), "q": normal(4, 3, seed=1)}
    got = agree(p, inputs)
    assert got["tall"].shape == (4, 8) and (got["tall"][1] == 0).all() and (got["o"][3] == 0).all()


@pytest.mark.usefixtures("ways")
def test_nested_iterative_ranks() -> None:
    p = program("""rank C iter
rank T = 3 iter
rank D
in x[C, T, D]: f32
out y[C, T, D]: f32
out last[D]: f32
carry[0, d] = 0.0
s[c, 0, d] = carry[c, d]
s[c, t+1, d] = s[c, t, d] * 0.5 + x[c, t, d]
y[c, t, d] = s[c, t+1, d] + carry[c, d]
carry[c+1, d] = s[c, T, d] * 2.0
last[d] = carry[C, d]
""")
    for chunks in (0, 1, 4):
        agree(p, {"x": normal(chunks, 3, 2)})


@pytest.mark.usefixtures("ways")
def test_recurrence_over_a_ragged_length() -> None:
    p = program("""rank B
rank T = len[b] iter
rank W
in len[B]: i64
in x[B, W]: f32
out y[B]: f32
s[b, 0] = 1.0
s[b, t+1] = s[b, t] * 0.5 + x[b, t]
y[b] = s[b, len[b]]
""")
    x, lengths = normal(3, 4), [0, 3, 1]
    want = []
    for b, n in enumerate(lengths):
        s = 1.0
        for t in range(n):
            s = s * 0.5 + x[b, t]
        want.append(s)
    assert np.allclose(interpret(p, {"len": lengths, "x": x})["y"], want)


@pytest.mark.usefixtures("ways")
def test_excluded_points_have_no_influence() -> None:
    p = program("""rank P
rank M
in a[P, M]: f32
in v[M]: f32
out s[P]: f32
out n[P]: f32
out top[P]: f32
out plain[P, M]: f32
s[p] = sum{m} a[p, m] * v[m] where m <= p
n[p] = sum{m} a[p, m] * v[m] where m < 2 and v[m] > -1.0
top[p] = max{m} a[p, m] * v[m+1] where m + 1 < M and m + 1 <= p
plain[p, m] = a[p, m] / v[m+1] where m + 1 < M
""")
    a, v = normal(3, 5), normal(5)
    a[np.triu_indices(3, 1, 5)] = math.inf
    a[0, 4] = math.nan
    v[4] = math.inf
    got = agree(p, {"a": a, "v": v})
    assert np.isfinite(got["s"]).all() and got["top"][0] == -math.inf


@pytest.mark.usefixtures("ways")
def test_selection_ties_and_linear_indices() -> None:
    p = program("""rank P
rank A = 3
rank B = 4
rank K = 5
rank L = 20
in x[P, A, B]: f32
out v[P, K]: f32
out i[P, K]: i64
out w[P, L]: f32 empty 7.0
out j[P, L]: i64 empty -1
out best[P]: f32
out at[P]: i32
out least[A]: f32
out low[A]: i64
v[p, k], i[p, k] = topk{a,b} x[p, a, b]
w[p, l], j[p, l] = topk{a,b} x[p, a, b]
best[p], at[p] = argmax{a,b} x[p, a, b] where b >= 1
least[a], low[a] = argmin{p,b} x[p, a, b]
""")
    x = np.random.default_rng(0).integers(0, 4, (6, 3, 4)).astype(float)
    got = agree(p, {"x": x})
    flat = x.reshape(6, 12)
    assert (got["i"] == np.argsort(-flat, axis=1, kind="stable")[:, :5]).all() and got["i"].dtype == np.int64
    assert (got["w"][:, 12:] == 7.0).all() and (got["j"][:, 12:] == -1).all()
    x[2, 1, 1] = math.nan
    again = interpret(p, {"x": x})
    assert again["at"][2] == np.argmax(np.where(np.arange(4) >= 1, x[2], -math.inf)) == again["i"][2, 0] == 5


@pytest.mark.usefixtures("ways")
def test_every_monoid_over_nothing_and_something() -> None:
    p = program("""rank P
rank M
in x[P, M]: f32
in n[M]: i64
in f[M]: bool
out s[P]: f32
out q[P]: f32
out a[P]: f32
out i[P]: f32
out every[P]: bool
out some[P]: bool
out count[P]: i64
out big[P]: f32
s[p] = sum{m} x[p, m]
q[p] = prod{m} x[p, m] where m < 3
a[p] = max{m} x[p, m]
i[p] = min{m} x[p, m] where x[p, m] > 0.0
every[p] = and{m} x[p, m] < 3.0 and f[m]
some[p] = or{m} x[p, m] > 1.0
count[p] = sum{m} n[m] where f[m]
big[p] = max{m} n[m] where m > p
""")
    for m in (0, 1, 6):
        got = agree(p, {"x": normal(4, m), "n": np.arange(m), "f": np.arange(m) % 2 == 0})
        assert got["count"].dtype == np.int64 and got["every"].dtype == bool
    assert agree(p, {"x": np.zeros((0, 3)), "n": np.zeros(3, int), "f": np.zeros(3, bool)})["s"].shape == (0,)


def test_integers_floor_and_stay_integers() -> None:
    p = program("""rank N
in a[N]: i64
in c[N]: u8
out q[N]: i64
out r[N]: i64
out z[N]: i64
out lo[N]: i8
q[n] = a[n] // 3
r[n] = a[n] % 3
z[n] = ceil(a[n]/3)
h[n] = a[n] * 2
lo[n] = (h[n] + (c[n] >> 4 & 15)) // 4 - 8
""")
    a, c = np.arange(-7, 8), np.arange(15, dtype=np.uint8) * 17
    got = agree(p, {"a": a, "c": c})
    assert (got["q"] == a // 3).all() and got["q"].dtype == np.int64
    assert (got["lo"] == (a * 2 + (c.astype(int) >> 4)) // 4 - 8).all()


def test_state_is_copied_and_old_values_stay_readable() -> None:
    p = program("""rank N
in at[]: i64
state s[N]: f32
out old[N]: f32
s'[at[]] = 9.0
old[n] = s[n] + s'[n]
""")
    s = normal(4)
    got = interpret(p, {"at": 2, "s": s})
    assert got["s"][2] == 9.0 and (np.delete(got["s"], 2) == np.delete(s, 2)).all()
    assert np.allclose(got["old"], s + got["s"]) and s[2] != 9.0
    untouched = program("rank N\nstate s[N]: f32\nout y[N]: f32\ny[n] = s[n]\n")
    assert (interpret(untouched, {"s": s})["s"] == s).all()


def test_empty_values_and_points_never_written() -> None:
    p = program("""rank N
in x[N]: f32
temp t[N]: f32 empty -inf
out y[N]: f32 empty 3.0
out z[N]: f32
t[n] = x[n] where n < 1
y[n] = x[n] where n >= 2
z[n] = exp(t[n])
""")
    got = agree(p, {"x": normal(3)})
    assert (got["z"][1:] == 0).all() and (got["y"][:2] == 3.0).all()


ERRORS = [
    ("rank N\nin x[N]: f32\nout y[N]: f32\ny[n] = x[n]\n", {}, None, "input 'x' is missing"),
    ("rank N\nin x[N]: f32\nout y[N]: f32\ny[n] = x[n]\n", {"x": [1.0], "w": [1.0]}, None, "no input is named 'w'"),
    ("rank N\nin x[N]: f32\nout y[N]: f32\ny[n] = x[n]\n", {"x": [[1.0]]}, None, "'x' has 2 dimensions"),
    ("rank N = 2\nin x[N]: f32\nout y[N]: f32\ny[n] = x[n]\n", {"x": [1.0]}, None,
     "rank N is 2, and dimension 0 of 'x'"),
    ("rank N\nin x[N]: f32\nin z[N]: f32\nout y[N]: f32\ny[n] = x[n]+z[n]\n", {"x": [1.0], "z": [1.0, 2.0]}, None,
     "rank N is 1, and dimension 0 of 'z'"),
    ("rank N <= 2\nin x[N]: f32\nout y[N]: f32\ny[n] = x[n]\n", {"x": [1.0] * 3}, None, "more than its bound 2"),
    ("rank N\nrank M\nin x[N]: f32\nout y[M]: f32\ny[m] = x[0]\n", {"x": [1.0]}, None, "rank M is not known"),
    ("rank N\nin x[N]: f32\nout y[N]: f32\ny[n] = x[n]\n", {"x": [1.0]}, {"M": 3}, "no rank or knob is named 'M'"),
    ("rank N\nin x[N]: i64\nout y[N]: f32\ny[n] = x[n]\n", {"x": [1.5]}, None, "'x' holds integers"),
    ("rank N\nin x[N]: i8\nout y[N]: f32\ny[n] = x[n]\n", {"x": [300]}, None, "does not fit i8"),
    ("rank N\nin x[N]: f32\nin i[N]: i64\nout y[N]: f32\ny[n] = x[i[n]]\n", {"x": [1.0, 2.0], "i": [0, 2]}, None,
     "x[i[n]] leaves 'x': index 2 in dimension 0 of 2 elements"),
    ("rank N\nin x[N]: f32\nin i[N]: i64\nout y[N]: f32\ny[i[n]] = x[n]\n", {"x": [1.0, 2.0], "i": [0, -1]}, None,
     "y[i[n]] leaves 'y': index -1"),
    ("rank N\nrank M0 = ?m0 in 2|4\nrank M1 = ceil(N/M0)\nin x[N]: f32\nout y[M1]: f32\n"
     "y[m1] = sum{m0} x[m1*M0 + m0]\n", {"x": [1.0] * 3}, None, "leaves 'x': index 3"),
]


@pytest.mark.parametrize(("text", "inputs", "sizes", "message"), ERRORS)
def test_bad_inputs_are_named(text: str, inputs: Arrays, sizes: dict[str, int] | None, message: str) -> None:
    with pytest.raises(InputError) as e:
        interpret(program(text), inputs, sizes)
    assert message in e.value.what
    if "leaves" in message:
        assert "statement 1: " in e.value.where and e.value.hint.startswith("at ")


def test_a_ragged_rank_needs_its_variables() -> None:
    p = program("rank B\nrank T = len[b]\nin len[B]: i64\nout y[T]: f32\ny[t] = 1.0\n")
    with pytest.raises(VerifyError, match="not in the iteration space"):
        interpret(p, {"len": [1, 2]})


def test_guarded_reads_may_leave_the_tensor() -> None:
    p = program("""rank N
rank M0 = ?m0 in 2|4
rank M1 = ceil(N/M0)
in x[N]: f32
out y[M1]: f32
y[m1] = sum{m0} x[m1*M0 + m0] * 1.0 where m1*M0 + m0 < N
""")
    for n in (0, 1, 3, 4, 7):
        for m0 in (2, 4):
            x = normal(n)
            got = interpret(p, {"x": x}, {"m0": m0})["y"]
            assert np.allclose(got, [x[i:i + m0].sum() for i in range(0, n, m0)])
    with pytest.raises(InputError, match="knob m0 cannot be 3"):
        interpret(p, {"x": normal(3)}, {"m0": 3})


def test_long_scores_stay_small_in_memory() -> None:
    p = program("""rank P
rank M
rank E
in q[P, E]: f32
in k[M, E]: f32
out s[P]: f32
out g[P]: f32
w[p, m] = sum{e} q[p, e] * k[m, e] where m <= p
g[p] = max{m} w[p, m] where m <= p
s[p] = sum{m} exp(w[p, m] - g[p]) * k[m, 0] where m <= p
""")
    n = 2048
    q, k = normal(n, 64), normal(n, 64, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = interpret(p, {"q": q, "k": k})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    w = np.where(np.tri(n, dtype=bool), q @ k.T, -math.inf)
    assert np.allclose(got["s"], np.exp(w - w.max(1, keepdims=True)) @ k[:, 0])
    assert grown * 1024 < n * n * 8 * 16, "the p*m*e products must not exist at once (that is 64 times the scores)"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "e4m3", "e5m2"])
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    names = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn,
             "e5m2": torch.float8_e5m2}
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000) * 2.0 ** rng.integers(-40, 18, 4000)
    x = np.concatenate([x, [0.0, 448.0, 464.0, 465.0, 65519.0, 65520.0, 2.0**-9, 3 * 2.0**-10, 1e38, -1e30]])
    x = x.astype(np.float32).astype(np.float64)
    want = torch.from_numpy(x.astype(np.float32)).to(names[dtype]).double().numpy()
    np.testing.assert_array_equal(round_to(x, dtype), want)
    assert round_to(np.array([1 + epsilon(dtype)]), dtype) == 1 + epsilon(dtype)
    assert round_to(np.array([1 + epsilon(dtype) / 2]), dtype) == 1.0, "a tie goes to the even neighbour"


def test_rounded_stores_round_and_others_do_not() -> None:
    p = program("rank N\nin x[N]: f64\ntemp t[N]: bf16\nout y[N]: f32\nt[n] = x[n]\n"
                "u[n] = t[n] / 3.0\ny[n] = u[n] * 3.0\n")
    x = normal(50)
    assert (interpret(p, {"x": x})["y"] != round_to(x, "bf16")).all()
    y = interpret(p, {"x": x}, rounded=True)["y"]
    assert (y == round_to(round_to(x, "bf16") / 3.0 * 3.0, "f32")).all()


def test_points_are_what_python_loops_say() -> None:
    """The point-by-point evaluator itself against plain loops, so that it cannot be wrong in the same way."""
    p = program("rank P\nrank M\nin x[M]: f32\nout y[P]: f32\ny[p] = sum{m} x[m] where m <= p\n")
    x = normal(4)
    want = {(i,): sum(x[j] for j in range(4) if j <= i) for i in range(3)}
    got = Points(p.cascade, {"x": x}, {"P": 3}).data["y"]
    assert got.keys() == want.keys() and all(math.isclose(got[i], want[i]) for i in want)
