"""A weighted frame or another pass, one share of a loop or several: the cost model chooses, says so, all are right."""

from __future__ import annotations

import re
import textwrap

import numpy as np
import pytest
import torch

import memcomp
from memcomp.choice import TIE
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.models.families import families
from memcomp.pipeline import compile_program, map_program
from tests.chains import FOLDER

WAY = re.compile(r"(?:not )?(.*), (\S+) s")


def chosen(closed: Program) -> dict[str, float]:
    """The forms that were made and their seconds, the chosen one first."""
    line = closed.proofs[-1]
    assert line.startswith("by cost at "), closed.proofs
    told = [WAY.fullmatch(x) for x in line.rpartition(": ")[2].replace(" s, not ", " s|not ").split("|")]
    return {m[1]: float(m[2]) for m in told if m is not None}


def variance(features: int) -> Program:
    """The variance of values under softmax(Q K), in this many features."""
    text = (FOLDER / "weighted_variance.mc").read_text()
    return parse(text.replace("rank F = 2", f"rank F = {features}").replace("rank E = 3", "rank E = 16"))


@pytest.mark.parametrize("rows,features,choice", [(300, 2, "a weighted frame"), (300, 64, "another pass"),
                                                  (1, 64, "another pass")])
def test_cost_chooses(rows: int, features: int, choice: str) -> None:
    """The weighted mean has the indices of row and feature: its updates are no product, which many rows and features
    pay for, while another pass makes scores and reads keys anew."""
    read = variance(features)
    closed = map_program(read, config=Config(), sizes={"P": rows, "M": 4000})
    told = chosen(closed)
    first = next(iter(told))
    assert first.startswith(choice) and told[first] <= (1 + TIE) * min(told.values())
    assert {x.partition(" in ")[0] for x in told} == {"a weighted frame", "another pass"}
    assert ("weighted gauge" in " ".join(closed.proofs)) == (choice == "a weighted frame")
    assert f"M: 4 -> {1 if choice == 'a weighted frame' else 2} passes" in closed.proofs
    rng = np.random.default_rng(0)
    x = {"Q": rng.standard_normal((3, 16)), "K": rng.standard_normal((70, 16)),
         "V": rng.standard_normal((70, features)) + 100}
    got = interpret_tile(lower(closed), x, {"P": 3, "M": 70})["O"]
    np.testing.assert_allclose(got, interpret(read, x)["O"], rtol=1e-3)


def test_nothing_is_said_where_there_is_no_choice() -> None:
    text = """
    program p on cpu
    rank P
    rank M
    in S[P, M]: f32
    out D[P]: f32
    GM[p] = max{m} S[p, m]
    D[p] = sum{m} exp(S[p, m] - GM[p])
    """
    assert not any("by cost" in p for p in map_program(parse(textwrap.dedent(text)), config=Config()).proofs)


def test_stations_show_the_form_that_runs() -> None:
    seen: dict[str, object] = {}
    made = compile_program(variance(64), config=Config(), sizes={"P": 300, "M": 4000}, observe=seen.__setitem__)
    assert len(made.tiles.kernels) == 2 and "weighted gauge" not in str(seen["reduce_passes"])
    assert str(made.program).startswith(str(seen["tune"]).rpartition("proof")[0])


def test_the_explanation_says_what_was_chosen() -> None:
    (family,) = (f for f in families() if f.name == "softmax_variance")
    told = memcomp.explain(family.fn, *family.inputs(33, 301, torch.float32))
    assert re.search(r"by cost at .*: a weighted frame, .*, not another pass", " ".join(str(told).split()))


ATTENTION = """
program attention on cpu
rank H
rank P
rank M
rank E = 16
rank F = 16
in Q[H, P, E]: f32
in K[M, E]: f32
in V[M, F]: f32
out O[H, P, F]: f32
S[h, p, m] = sum{e} Q[h, p, e] * K[m, e]
GM[h, p] = max{m} S[h, p, m]
W[h, p, m] = exp(S[h, p, m] - GM[h, p])
D[h, p] = sum{m} W[h, p, m]
O[h, p, f] = sum{m} W[h, p, m] * V[m, f] / D[h, p]
"""


@pytest.mark.parametrize("heads,queries,keys,shared", [(1, 1, 8192, True), (4, 1, 8192, False), (1, 512, 8192, False),
                                                       (1, 1, 4, False)])
def test_a_long_loop_of_few_tasks_runs_in_shares(heads: int, queries: int, keys: int, shared: bool) -> None:
    """Shares pay where cores would idle for long: not for as many tasks as cores, nor for a short rank, whose second
    kernel takes longer to start than it saves."""
    read = parse(textwrap.dedent(ATTENTION))
    machine = target("cpu")
    if machine.threads < 2:
        pytest.skip("one core has nobody to share with")
    if not shared and keys > 4:
        heads *= machine.threads
    closed = map_program(read, config=Config(), sizes={"H": heads, "P": queries, "M": keys})
    assert (len(lower(closed).kernels) > 1) == shared, closed
    if closed.proofs[-1].startswith("by cost"):
        assert next(iter(chosen(closed))) == (f"{machine.threads} shares" if shared else "one share")
    rng = np.random.default_rng(1)
    x = {"Q": rng.standard_normal((2, 3, 16)), "K": rng.standard_normal((301, 16)), "V": rng.standard_normal((301, 16))}
    got = interpret_tile(lower(closed), x, {"H": 2, "P": 3, "M": 301})["O"]
    np.testing.assert_allclose(got, interpret(read, x)["O"], rtol=1e-4, atol=1e-6)


def test_what_was_compiled_before_decides_no_mapping() -> None:
    """Equal programs of other sizes: each is mapped for its own, in either order; those mapped alike share a kernel."""
    from memcomp.pipeline import forget

    def shares(*extents: tuple[int, int]) -> list[str]:
        forget()
        made = [compile_program(variance(64), config=Config(), sizes={"P": p, "M": m}) for p, m in extents]
        return [str(c.tiles) for c in made]

    few, many = (1, 1 << 20), (1 << 16, 64)
    assert shares(few, many) == shares(many, few)[::-1] and len(set(shares(few, many))) == 2
    forget()
    a, b = (compile_program(variance(64), config=Config(), sizes={"P": n, "M": 64}) for n in (1 << 16, 1 << 17))
    assert a.entry is b.entry and a.problem != b.problem
