"""Several kernels in one launch in the CUDA C++ backend: on a model of blocks that run at one time, where a barrier
that is missing shows, they compute what the program says; the text compiles for four architectures without a stack; the
driver is asked for blocks that are all there; and the rule that chooses it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.binary import Binary
from memcomp.codegen.cuda import chain, compiled, emit, interpreted, launches, options, preferred
from memcomp.codegen.cuda.chain import WORDS
from memcomp.codegen.cuda.compile import compilers
from memcomp.codegen.cuda.emit import writers
from memcomp.codegen.cuda.host import COMPILERS, Form
from memcomp.codegen.cuda.spread import FILE, MOST, SPARE
from memcomp.codegen.cuda.words import HEAD
from memcomp.codegen.elf import resources
from memcomp.codegen.launches import Form as Code
from memcomp.codegen.launches import Launch, Layout, distinct
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.target import target as named
from memcomp.ir.text import parse
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.pipeline import compile_program, forget, map_program
from tests.mapped import arguments, same
from tests.test_launch import DECODE, Recorder, library, replace_driver, tensors, told  # noqa: F401

torch = pytest.importorskip("torch")

from memcomp.artifact import files, saved  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "cuda_chain.cu"
on_host = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler: kernels cannot run here")
to_cubin = pytest.mark.skipif(not compilers(), reason="neither NVRTC nor nvcc is here")

FEED = """
program feed
rank P
rank D = 32
rank F = 200
rank E = 32
in X[P, D]: bf16
in G[F, D]: bf16
in U[F, D]: bf16
in W[E, F]: bf16
out Y[P, E]: f32
R[p] = sum{d} X[p, d] * X[p, d]
A[p, f] = sum{d} X[p, d] * G[f, d]
B[p, f] = sum{d} X[p, d] * U[f, d]
Z[p, f] = sigmoid(A[p, f] / sqrt(R[p])) * B[p, f]
Y[p, e] = sum{f} Z[p, f] * W[e, f]
"""
LONE = """
program lone
rank N
rank D = 3
in X[N, D]: f32
out Y[N, D]: f32
out Z[N]: f32
Y[n, d] = X[n, d] * 2.0
Z[n] = sum{d} Y[n, d]
group g0: Y
  space N, D
group g1: Z
  space N
"""
BEST = """
program best
rank P
rank N = 40
rank K = 4
rank E = 16
in X[P, E]: f32
in W[N, E]: f32
in V[N, E]: f32
out O[P, E]: f32
S[p, n] = sum{e} X[p, e] * W[n, e]
T[p, k], I[p, k] = topk{n} S[p, n]
O[p, e] = sum{k} T[p, k] * V[I[p, k], e]
group g0: S, T, I
  space P
group g1: O
  space P
"""
# text, the extents that it is mapped for, extents that it is run with
CASES: dict[str, tuple[str, dict[str, int], tuple[dict[str, int], ...]]] = {
    "decode": (DECODE, {"H": 8, "M": 65536}, ({"H": 1, "M": 300}, {"H": 2, "M": 33}, {"H": 1, "M": 0})),
    "feed": (FEED, {"P": 1}, ({"P": 1}, {"P": 3})),
    "lone": (LONE, {}, ({"N": 300}, {"N": 1}, {"N": 0})),
    "best": (BEST, {}, ({"P": 7}, {"P": 1})),
}


@cache
def program(name: str, target: str = "h100") -> Program:
    text, sizes, _ = CASES[name]
    p = parse(text)
    return replace(p, target=target) if p.mapping.groups else map_program(
        p, config=Config(target=target, backend="cuda"), sizes=sizes)


@cache
def tiles(name: str, target: str = "h100") -> TileProgram:
    return lower(program(name, target))


@cache
def chained(name: str, target: str = "h100") -> Kernel:
    """All in one launch."""
    tp = tiles(name, target)
    return emit(tp, target, settings=(len(tp.kernels),))


@cache
def form(name: str, source: str = "") -> Form:
    k = chained(name)
    return Form(source or k.source, launches(k.program, "h100", None, k.runs))


def values(name: str, sizes: dict[str, int]) -> dict[str, Any]:
    p, rng = parse(CASES[name][0]), np.random.default_rng(0)
    extent = sizes | {r.name: int(r.extent.value) for r in p.cascade.ranks if isinstance(r.extent, Const)}
    return {t.name: torch.from_numpy(rng.normal(size=[extent[r] for r in t.ranks])).bfloat16().double().numpy()
            for t in p.cascade.inputs()}


def run(f: Form, p: Program, a: dict[str, Any]) -> dict[str, Any]:
    """What the model makes of it; memory that nobody has written holds no numbers."""
    tp = lower(p)
    args, known = arguments(tp, a, {})
    for x, q in zip(args, tp.params, strict=True):
        if q.role in ("out", "work") and x.is_floating_point():
            x.fill_(float("nan"))
    f.run({q.name: x for q, x in zip(tp.params, args, strict=True)}, dict(zip(tp.sizes, known, strict=True)))
    return {q.name: x.double().numpy() for q, x in zip(tp.params, args, strict=True) if q.role == "out"}


def right(f: Form, name: str, sizes: dict[str, int]) -> bool:
    p = program(name)
    a = values(name, sizes)
    want, got = interpret(p, a), run(f, p, a)
    return all(same(got[o], want[o], 1e-2 if name == "decode" else 1e-4, 1e-3) for o in want)


# -- meaning -----------------------------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize("name", ["decode", "feed", "lone", pytest.param("best", marks=pytest.mark.slow)])
def test_one_launch_equals_the_program(name: str) -> None:
    """Of one text with more and with fewer tasks than blocks, one call after another: the counter is never set back."""
    assert len(tiles(name).kernels) > 1 and len(launches(tiles(name), "h100", None, chained(name).runs)) == 1
    for sizes in CASES[name][2]:
        assert right(form(name), name, sizes), sizes


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_run_of_kernels_equals_the_program(name: str) -> None:
    p = program(name)
    for words, runs in options(tiles(name), named("h100")).items():
        for sizes in CASES[name][2]:
            a = values(name, sizes)
            args, known = arguments(tiles(name), a, {})
            interpreted(emit(tiles(name), "h100", settings=runs))(*args, *known)
            got = {q.name: x.double().numpy() for q, x in zip(tiles(name).params, args, strict=True)}
            assert all(same(got[o], x, 1e-2, 1e-3) for o, x in interpret(p, a).items()), words


# What a barrier over all blocks consists of, and what is left of it.
BROKEN = {
    "no barrier": ("  all_meet();\n", "", "decode"),
    "blocks arrive before their threads": ("void all_meet() {\n  __syncthreads();", "void all_meet() {", "lone"),
    "threads go on before their block": ("{}\n  }\n  __syncthreads();", "{}\n  }", "decode"),
    "nobody waits": ("    while (((before ^ look(at)) & 0x80000000u) == 0) {}\n", "", "decode"),
}
STUCK = {
    "the last block is never counted": ("0x80000000u - (gridDim.x - 1)", "0x80000000u - gridDim.x", "blocks wait"),
    "idle threads join in": ("thread < 64 && ", "", "wait"),
}


@on_host
@pytest.mark.parametrize("what", BROKEN)
def test_without_a_part_of_the_barrier_results_are_wrong(what: str) -> None:
    part, left, name = BROKEN[what]
    source = chained(name).source
    assert source.count(part) == 1
    assert right(form(name), name, CASES[name][2][0])
    try:
        assert not right(form(name, source.replace(part, left)), name, CASES[name][2][0])
    except Refusal as error:
        assert "wait" in str(error)


@on_host
@pytest.mark.parametrize("what", STUCK)
def test_what_waits_for_ever_is_an_error(what: str) -> None:
    part, left, why = STUCK[what]
    source = chained("decode").source
    assert source.count(part) == 1
    with pytest.raises(Refusal, match=why):
        right(form("decode", source.replace(part, left)), "decode", {"H": 3, "M": 300})


# -- text --------------------------------------------------------------------------------------------------------------


def own(text: str) -> str:
    return text[text.index('extern "C"'):]


def test_text_is_stable() -> None:
    """GOLDEN=write rewrites the file; read the difference before it is kept."""
    text = own(chained("lone").source)
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text() == own(emit(tiles("lone"), "h100", settings=(2,)).source)


def test_what_passes_between_kernels_is_neither_constant_nor_alone() -> None:
    """The compiler may take what a launch only reads for what nobody writes, and read it before the barrier."""
    k = chained("decode")
    head = own(k.source).split(") {")[0]
    for p in k.program.params:
        said = re.search(rf"(const )?(?:unsigned short|float) \*(__restrict__ )?{p.name}_ptr", head)
        assert said is not None
        assert bool(said[1]) == (p.role == "in") and bool(said[2]) == (p.role in ("in", "out")), p.name


def test_a_launch_of_several_takes_what_any_of_them_takes() -> None:
    k = chained("decode")
    parts, (one,) = launches(k.program, "h100"), launches(k.program, "h100", None, k.runs)
    assert one.together and not any(x.together for x in parts)
    assert one.block == max(x.block for x in parts) and one.shared == max(x.shared for x in parts)
    assert one.args == distinct(a for x in parts for a in x.args)
    for sizes in ({"H": 5, "M": 9}, {"H": 0, "M": 9}):
        assert one.blocks(sizes) == max(x.blocks(sizes) for x in parts)


def test_arguments_are_held_to_what_any_launch_takes_for_granted() -> None:
    args = [replace(launches(tiles("decode"), "h100")[0].args[0], multiple=n) for n in (4, 16, 1)]
    assert [a.multiple for a in distinct(args)] == [16]


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "few", "many"), [("decode", {"H": 8, "M": 65536}, {"H": 400, "M": 65536}),
                                                   ("feed", {"P": 1}, {"P": 1 << 20})])
def test_kernels_with_few_tasks_are_joined(name: str, few: dict[str, int], many: dict[str, int]) -> None:
    tp, machine = tiles(name), named("h100")
    words = preferred(tp, machine, few)
    assert options(tp, machine)[words] == (len(tp.kernels),) and preferred(tp, machine, many) == ""
    assert preferred(tp, machine, {}) == "", "nothing is known of the tasks"


def test_a_block_has_registers_for_the_greediest_kernel_and_the_most_threads() -> None:
    ws = writers(tiles("decode"), "h100")
    assert len({w.threads for w in ws}) == 2
    most = max(w.threads for w in ws)
    few, there = min(ws, key=lambda w: w.threads), min(MOST, FILE // most) - SPARE
    for few.pressure, fits in ((there, True), (there + 1, False)):
        assert (len(chain.options(ws, named("h100"))) == 2) == fits


@on_host
@pytest.mark.parametrize("heads", [2, 2000])
def test_who_compiles_need_not_ask_for_it(heads: int) -> None:
    forget()
    made = compile_program(parse(DECODE), config=Config(target="h100", backend="cuda", interpret=True),
                           sizes={"H": heads, "M": 8192})
    few = heads == 2
    assert made.kernel.launches == len(made.kernel.runs or made.tiles.kernels) == 1
    assert bool(made.choice.setting) == (made.kernel.runs == (2,)) == few
    assert (made.program.proofs[-1] == f"by cost: {made.choice.setting}") == few


# -- machine code and launch -------------------------------------------------------------------------------------------


@cache
def code(name: str, target: str = "h100") -> tuple[tuple[Launch, ...], tuple[bytes, ...]]:
    """Launches and machine code for tensors laid out as usual."""
    k = chained(name, target)
    made = compiled(k, Layout(tuple(len(p.shape) - 1 for p in k.program.params)))
    return made.launches, made.cubins


@to_cubin
@pytest.mark.parametrize(("name", "target"), [
    ("decode", "h100"), *(pytest.param(name, t, marks=pytest.mark.slow) for name in CASES
                          for t in ("a100", "rtx4090", "h100", "b200") if (name, t) != ("decode", "h100"))])
def test_machine_code_needs_no_stack(name: str, target: str) -> None:
    k, machine, (x,), (cubin,) = chained(name, target), named(target), *code(name, target)
    b = Binary(x.function, machine.capability, "", cubin, (), x.block // 32, x.shared, resources(cubin, x.function))
    assert b.resources.stack == 0 and "STL" not in b.sass
    assert b.resources.static + b.shared <= machine.level("smem").bytes + 1024 * (machine.capability >= 90)
    assert b.instructions("ATOM")["ATOM"] == len(k.program.kernels) - 1


SYNC = re.compile(r"\b(BAR\.SYNC|MEMBAR\.[A-Z.]+|ATOMG?\.E\.ADD[.A-Z]*|LDG?\.E\.STRONG[.A-Z]*|CCTL\.IVALL)|"
                  r"(c\[0x0\]\[0x4[48]\])")


@to_cubin
@pytest.mark.parametrize("capability", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 89, 100))])
def test_the_barrier_is_that_of_cooperative_groups(capability: int) -> None:
    """The same counter, the same fences, in the same order as in what CUDA's own header makes."""
    core = pytest.importorskip("cuda.core")

    def order(text: str) -> tuple[list[str], set[str]]:
        options_ = core.ProgramOptions(arch=f"sm_{capability}{'a' * (capability >= 90)}", std="c++17",
                                       use_bundled_headers=True)
        code = bytes(core.Program(text, "c++", options_).compile("cubin").code)
        found = SYNC.findall(Binary("k", capability, "", code, (), 8, 0, resources(code, "k")).sass)
        return [a for a, _ in groupby(a for a, _ in found if a)], {b for _, b in found if b}

    body = 'extern "C" __global__ void k(float *x) {{ x[threadIdx.x] = 1; {} x[threadIdx.x + 1] = x[blockIdx.x]; }}'
    ours = order(HEAD + WORDS + body.format("all_meet();"))
    theirs = order("#include <cooperative_groups.h>\n" + body.format("cooperative_groups::this_grid().sync();"))
    assert ours == theirs and len(ours[0]) == 6


@cache
def made() -> files.Saved:
    """For tensors laid out as usual only."""
    def one(k: Kernel, layout: Layout) -> Code:
        if layout.loose:
            raise Refusal("it is not compiled")
        return Code(layout, "", *code("decode"))

    return saved(chained("decode"), one)


@to_cubin
def test_no_more_blocks_are_launched_than_are_there_at_one_time() -> None:
    s, driver = made(), Recorder()
    call = replace_driver(files.Loaded(s).launched, driver)
    for heads, blocks in ((2, 66), (8, 264), (9, 264)):   # 33 shares a head; room for 264
        call(*tensors(chained("decode"), H=heads, M=1000), heads, 1000)
        assert driver.launches[-1][2] == (blocks, 1, 1)
    call(*tensors(chained("decode"), H=0, M=1000), 0, 1000)
    assert len(driver.launches) == 3 and len(driver.loaded) == 1


@to_cubin
def test_a_file_says_so() -> None:
    s = files.from_bytes(files.to_bytes(made()))
    assert s == made() and all(x.together for f in s.forms for x in f.launches)


@to_cubin
def test_the_driver_is_asked_for_a_cooperative_launch(library: Path) -> None:  # noqa: F811
    s = made()
    (x,), sizes = s.forms[0].launches, {"H": 16, "M": 1000}
    heard = told(library, s, sizes, sizes)
    start = heard.index(f"room 0x300 {x.block} {x.shared}")
    assert heard[:start] == ["load 7fELF", f"function {x.function}", f"attribute 8 {x.shared} 0x300 1"]
    first, second = (line.rsplit(" ", 1)[0] for line in heard[start + 1:])   # nothing else is asked the second time
    assert first == second == f"together 0x300 132,1,1 {x.block},1,1 {x.shared} 0x1234"
