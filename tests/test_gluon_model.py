"""The model of Gluon: right text gives right numbers in any order of its partitions, and what is wrong in it is seen.

The text is written by hand (`gluon_text`); every mutation of it must be caught whatever the order of a run is.
"""

import numpy as np
import pytest

from memcomp.codegen.gluon import model
from memcomp.codegen.gluon.model.values import BF16, BOOL, F32, I32, I64, Fault, Tensor, binary, rounded
from tests.gluon_text import ATTENTION

SIZES = {"M": 130, "N": 150, "D": 16, "BN": 32, "ST": 2}


def attention(text: str = ATTENTION, seed: int = 0, **changed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the text computes; the same in float64; the most that rounding weights to bf16 may change."""
    n = SIZES | changed
    rng = np.random.default_rng(7)
    q, k, v = (rounded(rng.standard_normal((r, n["D"])), BF16, None).data for r in (n["M"], n["N"], n["N"]))
    out = np.full(n["M"] * n["D"], np.nan, np.float32)
    args = {name: model.memory(x.ravel().copy(), name, "bf16") for name, x in (("Q", q), ("K", k), ("V", v))}
    scale = 1 / np.sqrt(n["D"])
    args |= {"O": model.memory(out, "O", "f32"), "scale": float(scale / np.log(2))}
    model.run(text, "attention", -(-n["M"] // 128), args | n, seed=seed)
    s = scale * (q.astype(np.float64) @ k.astype(np.float64).T)
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return out.reshape(n["M"], n["D"]), p @ v, p @ np.abs(v) * 2.0 ** -7


@pytest.mark.parametrize("sizes", [{}, {"N": 1}, {"N": 32}, {"N": 64, "M": 1}, {"N": 257, "ST": 3}, {"D": 64, "BN": 16},
                                   {"M": 256, "N": 128, "D": 128, "BN": 128}], ids=str)
def test_right_text_gives_right_numbers(sizes: dict[str, int]) -> None:
    made = [attention(seed=seed, **sizes) for seed in range(3)]
    got, exact, bound = made[0]
    assert (np.abs(got - exact) <= bound).all()
    assert all(np.array_equal(got, other) for other, _, _ in made[1:]), "the order of partitions changes no bit"


def without(word: str) -> str:
    """The text without the line of this comment."""
    lines = [x for x in ATTENTION.splitlines() if not x.endswith(f"# {word}")]
    assert len(lines) == len(ATTENTION.splitlines()) - 1, word
    return "\n".join(lines) + "\n"


def with_(old: str, new: str) -> str:
    assert old in ATTENTION, old
    return ATTENTION.replace(old, new)


ORDER = ("        acc = warpgroup_mma_wait(0, [more])  # acc done\n",
         "        mbarrier.arrive(v_free.index(last), count=1)  # v read\n")
MUTATIONS = {
    # name: (text, what the fault says)
    "no wait for Q": (without("q full"), "nothing has waited for the write"),
    "no wait for K": (without("k full"), "nothing has waited for the write"),
    "no wait for V": (without("v full"), "nothing has waited for the write|a phase was begun"),
    "no wait for room for K": (without("k free"), "written while it may be|more arrivals"),
    "no wait for room for V": (without("v free"), "written while it may be|more arrivals"),
    "K never given back": (without("k read"), "all wait"),
    "V never given back": (without("v read"), "all wait"),
    "V given back too soon": (with_("".join(ORDER), "".join(ORDER[::-1])), "written while it may be read"),
    "phase of K wrong": (with_("turn)  # k full", "turn ^ 1)  # k full"), "nothing has waited|all wait"),
    "phase of V wrong": (with_("turn)  # v full", "turn ^ 1)  # v full"),
                         "nothing has waited|all wait|a phase was begun"),
    "phase of room for K wrong": (with_("turn ^ 1)  # k free", "turn)  # k free"), "all wait"),
    "phase out of range": (with_("turn ^ 1)  # k free", "turn + 1)  # k free"), "0 or 1, not 2"),
    "one reader counted of two": (with_("count=2)  # both read k", "count=1)  # both read k"),
                                  "written while it may be read|nothing has waited|more arrivals|all wait"),
    "scores read in flight": (with_("(1, [s])  # s done", "(2, [s])  # s done"), "does not cover it"),
    "sums read in flight": (with_("(0, [more])  # acc done", "(1, [more])  # acc done"), "does not cover it"),
    "result read in flight": (with_("(0, [more])  # end", "(1, [more])  # end"), "does not cover it|in flight"),
    "sums read with no wait": (with_("acc = warpgroup_mma_wait(0, [more])  # acc done", "acc = more"), "roduct"),
    "fewer bytes expected": (with_("BN * D * 2)  # k bytes", "BN * D)  # k bytes"), "more bytes come"),
    "more bytes expected": (with_("BN * D * 2)  # k bytes", "BN * D * 4)  # k bytes"), "all wait"),
    "producer a step short": (with_("for i in range(0, n):", "for i in range(0, n - 1):"), "all wait"),
    "producer a step long": (with_("range(0, n):", "range(0, n + 1):"), "nothing waited for the transfer"),
    "wrong slot of V": (with_("(p, Vs.index(last)", "(p, Vs.index(at)"), "nothing has waited"),
    "slot outside": (with_("at = i % ST", "at = i % (ST + 1)"), "index 2 of"),
    "barrier not made": (without("both read k"), "no barrier that was initialised"),
    "layouts differ": (with_("gl.convert_layout(again, gl.SliceLayout(1, out))", "again"), "layouts differ"),
    "operand's layout": (with_("gl.DotOperandLayout(0, out, 2)", "out"), "a left operand whose layout"),
    "operand not rounded": (with_("p.to(gl.bfloat16)", "p"), "float32"),
    "rows not masked": (with_("mask=(row < M)[:, None] & ", "mask="), "O has"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_caught(name: str) -> None:
    text, says = MUTATIONS[name]
    for seed in range(3):
        with pytest.raises(Fault, match=says) as told:
            attention(text, seed)
        assert "line " in str(told.value) or "all wait" in str(told.value) or "phase was begun" in str(told.value)


def test_one_slot_is_too_few_for_two_blocks_at_once() -> None:
    """With one slot a consumer waits for the next values before it gives back the former: nobody can go on."""
    with pytest.raises(Fault, match="all wait") as told:
        attention(ST=1)
    for words in ("consumer (partition 0) waits for phase 1 of v_full", "producer (partition 2) waits for", "arrivals"):
        assert words in str(told.value)
    assert np.isfinite(attention(ST=1, N=32)[0]).all(), "one block needs one slot"


PIECES = '''\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def through(X, Y, n):
    """Y = X (64, 64) transposed times itself, written to shared memory by threads and read by tensor cores."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    row = gl.arange(0, 64, gl.SliceLayout(1, mma))
    col = gl.arange(0, 64, gl.SliceLayout(0, mma))
    x = gl.load(X + row[:, None] * 64 + col[None, :], (row < n)[:, None] & (col < 64)[None, :], 0.0)
    xs = gl.allocate_shared_memory(gl.bfloat16, [64, 64], flat, x)
    fence_async_shared()  # fence
    y = warpgroup_mma(xs.permute((1, 0)), xs, gl.zeros([64, 64], gl.float32, mma), use_acc=False)
    ys = gl.allocate_shared_memory(gl.bfloat16, [64, 64], flat)
    ys.store(y.to(gl.bfloat16))
    fence_async_shared()
    to = tma.make_tensor_descriptor(Y, [n, 64], [64, 1], [64, 64], flat)
    tma.async_store(to, [0, 0], ys)
    tma.store_wait(0)  # stored
    ys.store(gl.zeros([64, 64], gl.bfloat16, mma))
'''


def pieces(text: str = PIECES, n: int = 50) -> None:
    x = rounded(np.random.default_rng(3).standard_normal((64, 64)), BF16, None).data
    out = np.zeros(n * 64, np.float32)
    model.run(text, "through", 1, [model.memory(x.ravel().copy(), "X", "bf16"), model.memory(out, "Y", "bf16"), n])
    part = np.where(np.arange(64)[:, None] < n, x, 0).astype(np.float64)
    exact = (part.T @ part)[:n]
    assert np.abs(out.reshape(n, 64) - exact).max() <= 2.0 ** -8 * np.abs(exact).max()


def test_threads_and_units_take_turns_at_shared_memory() -> None:
    pieces()
    lines = PIECES.splitlines(keepends=True)
    with pytest.raises(Fault, match="no fence after the write"):
        pieces("".join(x for x in lines if not x.endswith("# fence\n")))
    with pytest.raises(Fault, match="written while it may be read"):
        pieces("".join(x for x in lines if not x.endswith("# stored\n")))


@pytest.mark.parametrize("a, b, dtype", [
    (Tensor(3, I32), 2, I32), (Tensor(3, I32), 2.5, F32), (Tensor(3, I64), Tensor(2, I32), I64),
    (Tensor(1.5, F32), 2, F32),
    (Tensor(1.5, BF16), 2.5, BF16), (Tensor(1.5, BF16), Tensor(2.5, F32), F32),
    (Tensor(3, I32), Tensor(2.5, BF16), BF16),
    (Tensor(True, BOOL), 1, I32)])
def test_types_are_triton_s(a: Tensor, b: object, dtype: object) -> None:
    assert binary("add", a, b).dtype is dtype


def test_integers_are_those_of_machines() -> None:
    assert int(Tensor(-7, I32) // 2) == -3 and int(Tensor(-7, I32) % 2) == -1, "to zero, as the GPU divides"
    with np.errstate(over="ignore"):
        assert int(Tensor(2**31 - 1, I32) + 1) == -2**31
    assert int(Tensor(2**31 - 1, I64) + 1) == 2**31
    assert binary("truediv", Tensor(1, I32), Tensor(2, I32)).dtype is F32


def test_bf16_rounds_to_the_nearest_even() -> None:
    x = np.random.default_rng(1).standard_normal(4096).astype(np.float32) * 10.0 ** np.arange(-16, 16).repeat(128)
    x = np.concatenate([x, [0.0, 1 + 2**-8, 1 + 3 * 2**-8]]).astype(np.float32)
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    near, far = np.abs(x.astype(np.float64) - down), np.abs(x.astype(np.float64) - up)
    even = (down.view(np.uint32) >> 16) % 2 == 0
    assert np.array_equal(rounded(x, BF16, None).data, np.where((near < far) | (near == far) & even, down, up))
    odd = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    assert np.array_equal(rounded(odd, BF16, None).data, [np.nan, np.inf, -np.inf, np.inf], equal_nan=True)
