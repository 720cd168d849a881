"""Cache specifications as text and values: round trip, errors, rules and the algebra behind them, classes, bytes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from memcomp.ir.errors import OptionError, ParseError, Refusal
from memcomp.passes.kv.account import Shape, account, bits
from memcomp.passes.kv.rules import RULES, broken, verify
from memcomp.passes.kv.side import based, rotate
from memcomp.passes.kv.slots import Basis, Encode, KVSpec, Map, Region, Select, Side, Tokens
from memcomp.passes.kv.status import correctness, lacks
from memcomp.passes.kv.systems import read, system, systems
from memcomp.passes.kv.text import canonical, parse, show
from memcomp.passes.kv.words import CLASSES, WORDS
from tests.kv_specs import SHAPE, anything, likely

SOON = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
BODY = "region body: rest\n  k, v: "
NEW = "region new: last 8\n  k, v: f16\n"


@SOON
@given(anything())
def test_any_value_is_read_as_it_is_written(spec: KVSpec) -> None:
    assert parse(show(spec)) == spec
    assert parse(show(canonical(spec))) == canonical(spec)
    names = {r.name for r, _, _ in broken(spec, SHAPE)}
    if names:
        with pytest.raises(Refusal, match="hint: rule (" + "|".join(names) + "): "):
            verify(spec, SHAPE)
    else:
        assert verify(spec, SHAPE) is spec


@SOON
@given(likely())
def test_likely_ones_are_legal_or_say_which_rule(spec: KVSpec) -> None:
    assert parse(show(spec)) == spec
    if not next(broken(spec, SHAPE), None):
        assert correctness(spec) in CLASSES and isinstance(lacks(spec, SHAPE), tuple)
        assert all(r.bytes >= 0 for r in account(spec, SHAPE))


def test_a_digest_is_of_what_is_said() -> None:
    a = parse("kivi{bits=4}")
    renamed = replace(a, name="mine", regions=tuple(replace(r, name=f"x{r.name}") for r in a.regions))
    said = parse(show(a).replace("{bits=4, group=32} along n", "{group=32, mode=min, bits=4} along n"))
    assert a.digest == renamed.digest == said.digest and len(a.digest) == 64
    assert len({a.digest, parse("kivi{bits=2}").digest, parse("kivi{group=64, bits=4}").digest}) == 3


@pytest.mark.parametrize("text, wanted", [
    ("kv", "expected a name, found the end of the line\n   1 | kv\n     |   ^\nhint: write kv NAME"),
    ("kv a\nregion b: rest\n  k, v: it8 | int{bits=4}",
     "'it8' is none of the steps before a codec\n   3 |   k, v: it8 | int{bits=4}\n     |         ^^^\nhint: known: "),
    ("kv a\nregion b: rset", "unknown kind of tokens 'rset'\n   2 | region b: rset\n     |           ^^^^\n"
                             "hint: did you mean 'rest'? known: blocks, chosen, first, last, rest"),
    ("kv a\nregion b: rest\n  k: hadamard{sise=4} | f16",
     "hadamard has no parameter 'sise'\n   3 |   k: hadamard{sise=4} | f16\n     |               ^^^^\n"
     "hint: did you mean 'size'?"),
    ("kv a\nregion b: rest\n  k: outliers{share=0.1} | hadamard | f16", "'hadamard' comes too late\n"),
    ("kv a\nregion b: rest\n  k: offline | f16", "offline needs its rank\n"),
    ("kv a\nregion b: rest\n  k: hadamard", "expected '|', found the end of the line\n"),
    ("kv a\nregion b: first x", "expected an integer, found 'x'\n"),
    ("kv a\n  k: f16", "'k' belongs to a region\n"),
    ("kv a\nregion b: rest\nregion c: rest", "region b says nothing of its streams\n"),
    ("kv a\nregion b: rest\n  k, v: f16\n  drop", "'drop' behind streams\n"),
    ("kv a\nregion b: rest\n  drop\n  k, v: f16", "'k' behind drop\n"),
    ("kv a\nregion b: rest\n  select norm{budget=4}\n  select norm{budget=2}", "'select' behind select\n"),
    ("kv a\nregion b layers [0] layers [1]: rest", "'layers' is said twice\n"),
    ("kv a\nkv b", "a line cannot start with 'kv'\n"),
    ("kv a\nmap pages{scales=upside}", "scales of pages cannot be upside\n"),
    ("kv a\nmap pages{pad=1}", "pad of pages cannot be 1\n   2 | map pages{pad=1}\n     |           ^^^\n"
                              "hint: it is true or false"),
    ("kv a\nupdate token\nupdate token", "a second 'update'\n"),
    ("kv a\nregion b: rest\n  k: int{bits=4, bits=2}", "'bits' is said twice\n"),
    ("kivy{bits=4}", "unknown system 'kivy'\n   1 | kivy{bits=4}\n     | ^^^^\nhint: did you mean 'kivi'? known: "),
    ("kivi{bit=4}", "kivi has no parameter 'bit'\n   1 | kivi{bit=4}\n     |      ^^^\nhint: did you mean 'bits'? "
                    "known: bits, group, residual"),
    ("kivi{bits=true}", "bits of kivi cannot be true\n"),
    ("kivi{bits=4} v", "expected the end of the line, found 'v'\n"),
    ("", "the text holds no specification\n"),
])
def test_a_wrong_text_shows_where(text: str, wanted: str) -> None:
    with pytest.raises(ParseError) as e:
        parse(text)
    assert str(e.value).startswith(wanted), str(e.value)


BROKEN = {  # rule -> texts that break it, and text that is nearly the same and legal
    "fields": (["map pages{align=0}\n" + BODY + "f16", "map pages{size=-4}\n" + BODY + "f16",
                BODY + "f16\n" + BODY + "f16", "map pages{size=0}\n" + BODY + "f16",
                "region a layers [::0]: rest\n  k, v: f16\n" + BODY + "f16",
                "share layers{map=[0, 0], group=2}\n" + BODY + "f16"], "map pages{size=4}\n" + BODY + "f16"),
    "sources": (["cut k\nregion body: rest\n  k: f16", "cut k, k, v\n" + BODY + "f16", "cut x, v\n" + BODY + "f16"],
                "cut c{width=8}, r{width=4}\nregion body: rest\n  c, r: f16"),
    "streams": (["region body: rest\n  k: f16", BODY + "f16\nplace x host",
                 BODY + "f16\nplace k host\nplace k flash"], BODY + "f16\nplace k host\nplace v flash"),
    "cover": (["region a: first 4\n  k, v: f16", NEW + "region a: first 4\n  k, v: f16\n" + BODY + "f16",
               "region a: first 4\n  k, v: f16\nregion b: first 8\n  k, v: f16\n" + BODY + "f16",
               "region a: rest\n  drop",
               "region a: last 0\n  k, v: f16\nregion b: rest\n  drop", BODY + "f16\nregion late: rest\n  k, v: f16",
               "region a layers [0]: rest\n  k, v: f16"], "region a layers [0]: rest\n  k, v: f16\n" + BODY + "bf16"),
    "codec": ([BODY + "itn{bits=4}", BODY + "int{bit=4}", BODY + "int{bits=9}"], BODY + "int{bits=4, group=row}"),
    "fits": ([BODY + "int{group=48}", BODY + "hadamard{size=48} | f16", BODY + "offline{rank=256} | f16",
              "share layers{group=5}\n" + BODY + "f16", "share layers{map=[0, 4]}\n" + BODY + "f16"],
             BODY + "hadamard{size=64} | offline{rank=64, where=tile} | int{group=32}"),
    "open-group": ([BODY + "int{group=32} along n", NEW + BODY + "int{group=32} along n\nupdate group{every=16}",
                    "update group{every=16}\n" + BODY + "f16", NEW + BODY + "f16\n  merge mean{group=4}",
                    NEW + "region b: blocks 4 every 2\n  k, v: f16\n" + BODY + "int{group=32} along n\n"
                    "update group{every=32}"],
                   NEW + BODY + "int{group=32} along n\nupdate group{every=64}"),
    "select-before-groups": (
        [NEW + BODY + "int{group=32} along n\n  select norm{budget=64, when=token, unit=16}\nupdate group{every=32}",
         NEW + BODY + "int{group=32} along n\nupdate group{every=32}\nmap pages{size=16}"],
        NEW + BODY + "int{group=32} along n\n  select norm{budget=64, when=token, unit=32}\nupdate group{every=32}\n"
        "map pages{size=64}"),
    "write-once": ([BODY + "int\nupdate token{rewrite=true}", "region new: last 8\n  k, v: int\n" + BODY + "int",
                    BODY + "int\n  merge mean{group=0}"], "region new: last 8\n  k, v: int\nregion body: rest\n  drop"),
    "rollback": ([NEW + BODY + "f16\nupdate group{every=8, rollback=9}"],
                 NEW + BODY + "f16\nupdate group{every=8, rollback=8}"),
    "shared-storage": (["share layers{group=2}\nregion a layers [1]: rest\n  k, v: f16\n" + BODY + "bf16",
                        "share layers{map=[0, 0, 1, 3]}\n" + BODY + "f16",
                        "share heads{group=2}\nregion a heads [3]: rest\n  k, v: int\n" + BODY + "f16"],
                       "share layers{group=2}\nregion a layers [0, 1]: rest\n  k, v: f16\n" + BODY + "bf16"),
    "headless": (["cut x\nregion a heads [0]: rest\n  x: f16\nregion b: rest\n  x: f16",
                  "cut x\nshare heads{group=2}\nregion b: rest\n  x: f16",
                  "cut x\nregion b: rest\n  x: hadamard{rank=h} | f16"],
                 "cut x\nregion a layers [0]: rest\n  x: f16\nregion b: rest\n  x: bf16"),
    "inline-alignment": ([BODY + "int{bits=4, group=32}\nmap dense{scales=inline, align=64}",
                          BODY + "int{bits=4, group=32}\nmap dense{scales=side, align=64}",
                          BODY + "int{bits=4, group=32}\nmap pages{size=4, scales=trailing, align=128}"],
                         BODY + "int{bits=4, group=32}\nmap dense{scales=inline, align=64, pad=true}"),
    "rope-positions": (["cut k{rope=before}, v\n" + BODY + "f16\n  select norm{budget=9}",
                        "cut k{rope=before}, v\n" + NEW + BODY + "f16\n  merge mean{group=1}"],
                       "cut k{rope=before}, v\n" + BODY + "f16\n  select norm{budget=9}\nmap dense{positions=true}"),
    "absorb-before-rope": (["region body: rest\n  k: hadamard{where=weights} | f16\n  v: f16",
                            "region body: rest\n  k: permute{where=weights} | f16\n  v: f16"],
                           "region body: rest\n  k: hadamard | f16\n  v: hadamard{where=weights} | f16"),
    "pair-scale": (["region body: rest\n  k: scale{where=weights} | f16\n  v: f16"],
                   "region body: rest\n  k: scale{where=weights, pairs=true} | f16\n  v: scale{where=weights} | f16"),
    "heads-apart": ([BODY + "hadamard{rank=h, where=weights} | f16", "region a heads [0]: rest\n  k, v: f16\n" + BODY
                     + "hadamard{rank=h} | f16"], BODY + "hadamard{rank=h} | f16"),
    "project-rope": (["region body: rest\n  k: offline{rank=8, where=weights} | f16\n  v: f16",
                      "cut k{rope=before}, v\n" + BODY + "offline{rank=8} | f16"],
                     "cut k{rope=before}, v\n" + BODY + "offline{rank=8, where=tile} | f16"),
    "residue": ([BODY + "outliers{share=0.1} | f16", BODY + "lowrank{rank=4} | int", BODY + "outliers | int",
                 NEW + BODY + "outliers{share=0.1} | outliers{share=0.2} | int\nupdate group{every=16}",
                 "region a: first 4\n  k, v: outliers{share=0.1} | int\n" + BODY + "f16"],
                NEW + BODY + "outliers{share=0.1} | lowrank{rank=4} | int\nupdate group{every=16}"),
    "budget": ([BODY + "f16\n  select norm", BODY + "f16\n  select norm{budget=4, share=0.5}",
                BODY + "f16\n  select strip{budget=4}", BODY + "f16\n  select pages{budget=4, when=read}",
                BODY + "f16\n  select norm{budget=4, unit=2}",
                "region a: chosen norm{budget=4}\n  k, v: f16\n" + BODY + "int\n  select norm{budget=4}"],
               BODY + "f16\n  select norm{budget=4}"),
}


@pytest.mark.parametrize("name", [r.name for r in RULES])
def test_every_rule_refuses_by_its_name(name: str) -> None:
    texts, legal = BROKEN[name]
    (rule,) = (r for r in RULES if r.name == name)
    assert rule.says[0].islower() and not rule.says.endswith(".")
    for text in texts:
        spec = parse(f"kv a\n{text}")
        with pytest.raises(Refusal) as e:
            verify(spec)
        assert {r.name for r, _, _ in broken(spec)} == {name}, str(e.value)
        assert str(e.value).endswith(f"hint: rule {name}: {rule.says}") and str(e.value).startswith("kv a: ")
        assert str(e.value).count("\n") == 2, "three lines"
    verify(parse(f"kv a\n{legal}"))


def test_a_field_that_a_word_does_not_take_is_refused() -> None:
    plain = Encode("f16")
    body = Region("body", Tokens("rest"), (Side("k", plain, (Basis("offset", size=4),)), Side("v", plain)))
    with pytest.raises(Refusal, match="offset takes no size"):
        verify(KVSpec("a", parse("plain").cuts, (body,)))
    with pytest.raises(Refusal, match="Map has no word 'rows'"):
        verify(replace(parse("plain"), map=Map("rows")))


def test_a_model_without_a_rotary_embedding_has_no_rule_about_it() -> None:
    spec = parse("kv a\nregion body: rest\n  k: hadamard{where=weights} | offline{rank=8, where=weights} | f16\n"
                 "  v: f16")
    verify(spec, Shape(rope=False))
    assert {r.name for r, _, _ in broken(spec)} == {"absorb-before-rope", "project-rope"}


def _scores(change: Any, heads: int = 1) -> Any:
    """Scores of rotated queries and keys [h, n, e] whose unrotated values went through `change`."""
    q, k = np.random.default_rng(0).standard_normal((2, heads, 40, 16))
    at = np.arange(40)
    return np.einsum("hme,hne->hmn", *(rotate(x, at, 100.0) for x in change(q, k)))


@pytest.mark.parametrize("basis, commutes", [
    (Basis("hadamard"), False), (Basis("orthogonal"), False), (Basis("permute"), False), (Basis("scale"), False),
    (Basis("scale", pairs=True), True)])
def test_what_rules_say_of_the_rotary_embedding_is_so(basis: Basis, commutes: bool) -> None:
    """A basis that is folded into the weights of queries and keys stands before the rotary embedding."""
    rng = np.random.default_rng(1)
    factors = rng.uniform(0.5, 2, 8 if basis.pairs else 16)
    tables = {"k.orthogonal": np.linalg.qr(rng.standard_normal((16, 16)))[0], "k.permute": rng.permutation(16),
              "k.scale": np.tile(factors, 2) if basis.pairs else factors}

    def change(q: Any, k: Any) -> Any:
        there = based(k[None], basis, "k", tables)[0]
        return based(q[None], basis, "k", tables, back=basis.word == "scale")[0], there

    assert np.allclose(_scores(change), _scores(lambda q, k: (q, k)), atol=1e-9) == commutes


def test_whole_pairs_may_move_with_their_frequencies() -> None:
    order = np.random.default_rng(1).permutation(8)
    q, k = np.random.default_rng(0).standard_normal((2, 40, 16))
    at = np.arange(40)
    angles = at[:, None] * 100.0 ** (-np.arange(8) / 8)

    def turned(x: Any, angle: Any) -> Any:
        a, b = x[:, :8], x[:, 8:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    both = np.concatenate([order, order + 8])
    want = turned(q, angles) @ turned(k, angles).T
    np.testing.assert_allclose(turned(q[:, both], angles[:, order]) @ turned(k[:, both], angles[:, order]).T, want)
    assert not np.allclose(turned(q[:, both], angles) @ turned(k[:, both], angles).T, want)


def test_a_rotation_across_heads_is_undone_and_commutes() -> None:
    k = np.random.default_rng(0).standard_normal((1, 4, 40, 16))
    h = Basis("hadamard", rank="h")
    mixed = rotate(based(k, h, "k", {}), np.arange(40), 100.0)
    np.testing.assert_allclose(based(mixed, h, "k", {}, back=True), rotate(k, np.arange(40), 100.0), atol=1e-12)


def test_an_offset_splits_exactly() -> None:
    """What is stored is k less the rotated bias; the score gets q times the rotated bias back."""
    q, k = np.random.default_rng(0).standard_normal((2, 40, 16))
    bias, at = np.random.default_rng(1).standard_normal(16) * 50, np.arange(40)
    rotated, turned = rotate(k + bias, at, 100.0), rotate(np.broadcast_to(bias, k.shape), at, 100.0)
    np.testing.assert_allclose(q @ (rotated - turned).T + q @ turned.T, q @ rotated.T)


@pytest.mark.parametrize("text, kind", [
    ("plain", "exact"), ("paged", "exact"), ("cla", "exact"), ("mla", "exact"), ("kivi", "bounded"),
    ("eigen", "bounded"),
    ("mikv", "bounded"), ("kvsharer", "semantic"), ("streaming", "semantic"), ("snapkv", "semantic"),
    ("razor", "semantic"), ("kinetics", "semantic")])
def test_classes(text: str, kind: str) -> None:
    assert correctness(parse(text)) == kind


@pytest.mark.parametrize("text, of", [  # kv.md's table of formats, at 128 channels
    ("int{bits=4, group=32}", "5"), ("int{bits=2, group=32}", "3"), ("int{bits=4, group=128}", "17/4"),
    ("int{bits=8, group=row, mode=sym, scale=f32}", "33/4"), ("q8_0", "17/2"), ("q4_0", "9/2"), ("q5_1", "6"),
    ("mx{format=e2m1}", "17/4"), ("nvfp4", "9/2"), ("vq{bits=8, width=8, group=row}", "1")])
def test_bits_of_a_value(text: str, of: str) -> None:
    assert bits(parse(f"kv a\n{BODY}{text}"), Shape()) == Fraction(of)


def test_bytes_are_counted_with_pages_slots_and_positions() -> None:
    text = (f"kv a\n{BODY}int{{bits=4, group=32}}\n"
            "map pages{size=16, scales=inline, align=16, pad=true, positions=true}")
    shape = Shape(layers=2, batch=3, heads=2, tokens=20, head=64)
    slot = 48  # two groups of 20 bytes, padded
    rows = account(parse(text), shape)
    assert sum(r.bytes for r in rows if r.plane == "all") == 2 * 3 * 2 * 2 * 32 * slot  # sides, layers, ..., two pages
    assert sum(r.bytes for r in rows if r.plane == "page table") == 3 * 2 * 4
    assert sum(r.bytes for r in rows if r.plane == "positions") == 2 * 3 * 20 * 4


def test_a_bad_block_of_the_table_is_named() -> None:
    with pytest.raises(ParseError, match="a has no source"):
        read("system a\n  title A\nkv a\nregion b: rest\n  k, v: f16", "x")
    (row,) = read("# text\nsystem a{n=4}\n  title A\n  source B\n  says one\n  says two\nkv a\nregion b: last n\n"
                  "  k, v: f16", "x")
    assert row.says == "one two" and row.spec(n=9).regions[0].tokens == Tokens("last", 9) and row.text == "a{n=4}"
    with pytest.raises(OptionError, match="n of a cannot be x"):
        row.spec(n="x")


def test_no_code_knows_a_system() -> None:
    from pathlib import Path

    import memcomp.passes.kv as room

    folder = Path(str(room.__file__)).parent
    code = "\n".join(f.read_text() for f in folder.rglob("*.py") if f.name != "ggml.py")
    said = "\n".join(line.partition("#")[0] for line in code.splitlines())
    names = [n for n in systems() if f'"{n}"' in said and n not in WORDS.get(Select, {})]
    assert not names, names


def test_systems_are_the_table_of_the_papers() -> None:
    named = ["kivi", "qserve", "kvquant", "rotatekv", "gear", "cq", "quantspec", "xquant", "bfp_rearranged", "accllm",
             "cla", "mla", "eigen", "snapkv", "l2_norm", "scissorhands", "h2o", "razor", "kinetics", "longgen", "paged",
             "vattention"]
    assert not [n for n in named if lacks(system(n).spec())]
    for row in systems().values():
        spec = row.spec()
        assert spec.name == row.name and parse(str(spec)) == spec and verify(spec) is spec and row.title and row.source
    with pytest.raises(OptionError, match="no system is called 'kiwi'\nhint: did you mean 'kivi'"):
        system("kiwi")
