"""What every emitted module begins with: functions that Triton lacks, or whose Triton form is not what is meant.

Error bounds are against float64, in units of the last place of f32, for results that are normal numbers; f32 throughout
(arguments of f64 take the same formulas in f64).
"""

from memcomp.codegen.triton.best import WORDS

HEAD = '''\
import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no bf16: it is given f32 tensors
NAN = tl.constexpr(tl.PropagateNan.ALL)
'''

# name -> (source, other functions that it needs).  The interpreter runs the same text.
FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "to_bf16": ('''\
@triton.jit
def to_bf16(x):
    """Nearest, ties to even; under the interpreter the rounded f32."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, up.to(tl.float32, bitcast=True), x)
    else:
        return x.to(tl.bfloat16)
''', ()),
    "wide": ('''\
@triton.jit
def wide(x):
    """A 64-bit integer, for addresses."""
    return tl.full((), 0, tl.int64) + x
''', ()),
    "short": ('''\
@triton.jit
def short(x, n):
    """As 32 bits; what lies outside of 0..n as the number next to it."""
    return tl.cast(tl.minimum(tl.maximum(tl.cast(x, tl.int64), -1), n), tl.int32)
''', ()),
    "floordiv": ('''\
@triton.jit
def floordiv(a, b):
    """Rounds down; Triton's // rounds to zero."""
    return (a - mod(a, b)) // b
''', ("mod",)),
    "mod": ('''\
@triton.jit
def mod(a, b):
    """Has the sign of b; Triton's % has that of a."""
    return ((a % b) + b) % b
''', ()),
    "highest": ('''\
@triton.jit
def highest(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)
''', ()),
    "lowest": ('''\
@triton.jit
def lowest(a, b):
    return tl.minimum(a, b, propagate_nan=NAN)
''', ()),
    "most": ('''\
@triton.jit
def most(a, b):
    return tl.maximum(a, b)
''', ()),
    "least": ('''\
@triton.jit
def least(a, b):
    return tl.minimum(a, b)
''', ()),
    "highest_over": ('''\
@triton.jit
def highest_over(x, axis: tl.constexpr):
    """A NaN stays one; the interpreter is quick only with what it knows by name, which drops a NaN."""
    if INTERPRET:
        return tl.where(tl.sum((x != x).to(tl.int32), axis) > 0, float("nan"), tl.max(x, axis))
    else:
        return tl.reduce(x, axis, highest)
''', ("highest",)),
    "lowest_over": ('''\
@triton.jit
def lowest_over(x, axis: tl.constexpr):
    if INTERPRET:
        return tl.where(tl.sum((x != x).to(tl.int32), axis) > 0, float("nan"), tl.min(x, axis))
    else:
        return tl.reduce(x, axis, lowest)
''', ("lowest",)),
    "times": ('''\
@triton.jit
def times(a, b):
    return a * b
''', ()),
    "both": ('''\
@triton.jit
def both(a, b):
    return a & b
''', ()),
    "either": ('''\
@triton.jit
def either(a, b):
    return a | b
''', ()),
    "expm1": ('''\
@triton.jit
def expm1(x):
    """Kahan's form: the error of exp(x) and that of its logarithm cancel."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where((u - 1.0 == -1.0) | (u == float("inf")), u - 1.0, (u - 1.0) * x / tl.log(u)))
''', ()),
    "log1p": ('''\
@triton.jit
def log1p(x):
    """Kahan's form."""
    u = 1.0 + x
    return tl.where((u == 1.0) | (u == float("inf")), tl.where(u == 1.0, x, u), tl.log(u) * x / (u - 1.0))
''', ()),
    "tanh64": ('''\
@triton.jit
def tanh64(x):
    """Of f64, as near as expm1 is."""
    t = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, t / (2.0 + t), -t / (2.0 + t))
''', ("expm1",)),
    "tanh": ('''\
@triton.jit
def tanh(x):
    """By exp(-2|x|), which cannot overflow; near 0 by its series, whose next term is below 1e-8 of it."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835 - y * (1382.0 / 155925))))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0.0, -far, far))
''', ()),
    "digits": ('''\
@triton.jit
def digits(n, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr, e: tl.constexpr):
    """The n-th of five words."""
    first = tl.where(n > 0, tl.full((), b, tl.uint32), tl.full((), a, tl.uint32))
    third = tl.where(n > 2, tl.full((), d, tl.uint32), tl.where(n > 1, tl.full((), c, tl.uint32), first))
    return tl.where(n > 3, tl.full((), e, tl.uint32), third).to(tl.uint64)
''', ()),
    "sine": ('''\
@triton.jit
def sine(x, turn: tl.constexpr):
    """sin(x + turn * pi/2).  Libraries keep the digits of 2/pi in local memory.  Here an x of up to 8,192 loses its
    multiple of pi/2 in three steps, the first two exact; of a larger one, times 1/(2 pi), only the 64 digits are made
    that follow those of whole turns.  Errs by at most 2**-23."""
    if x.dtype == tl.float64:
        return tl.cos(x) if turn else tl.sin(x)
    else:
        small = tl.abs(x) <= 8192.0
        y = tl.where(small, x, 0.0)
        k = tl.floor(y * 0.6366197723675814 + 0.5)
        near = ((y - k * 1.5703125) - k * 0.0004837512969970703) - k * 7.549790126404332e-08
        bits = x.to(tl.uint32, bitcast=True)
        power = (bits >> 23) & 255
        at = power - 118  # the digit of 1/(2 pi), behind 32 zeros, that is a half turn's
        first = digits(at >> 5, 0, 0x28BE60DB, 0x9391054A, 0x7F09D5F4, 0x7D4D3770)
        second = digits(at >> 5, 0x28BE60DB, 0x9391054A, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566)
        third = digits(at >> 5, 0x9391054A, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566, 0x4F10E410)
        by = (at & 31).to(tl.uint64)
        high = (((first << 32) | second) << by) >> 32
        low = (((second << 32) | third) << by) >> 32
        turns = ((high << 32) | low) * ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
        part = (turns >> 32).to(tl.uint32)
        quarter = (part + 0x20000000) >> 30
        far = (part - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
        r = tl.where(small, near, tl.where(x < 0.0, -far, far))
        q = quarter.to(tl.int32, bitcast=True)
        q = tl.where(small, k.to(tl.int32), tl.where(x < 0.0, -q, q)) + turn
        z = r * r
        odd = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
        even = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
        value = tl.where((q & 1) != 0, even, odd)
        return tl.where(power == 255, float("nan"), tl.where((q & 2) != 0, -value, value))
''', ("digits",)),
    "xlogx": ('''\
@triton.jit
def xlogx(x):
    return tl.where(x == 0.0, 0.0, x * tl.log(x))
''', ()),
    **{f"{word}_f32": (f'''\
@triton.jit
def {word}_f32(a, b):
    """Nothing is fused with it."""
    one = tl.full((), 1.0, tl.float32)
    if INTERPRET:
        return a * one {sign} b * one
    else:
        return tl.inline_asm_elementwise("{word}.rn.f32 $0, $1, $2;", "=f,f,f", [a * one, b * one], dtype=tl.float32,
                                         is_pure=True, pack=1)
''', ()) for word, sign in (("add", "+"), ("sub", "-"), ("mul", "*"))},
    "as_bf16": ('''\
@triton.jit
def as_bf16(x):
    return tl.cast(to_bf16(tl.cast(x, tl.float32)), tl.float32)
''', ("to_bf16",)),
    "div_f32": ('''\
@triton.jit
def div_f32(a, b):
    """As IEEE rounds it, which / does not."""
    one = tl.full((), 1.0, tl.float32)
    return tl.div_rn(a * one, b * one)
''', ()),
    "nearest": ('''\
@triton.jit
def nearest(x):
    """The nearest integer, ties to even."""
    down = tl.floor(x)
    part = x - down
    odd = down - 2.0 * tl.floor(down * 0.5)
    return tl.where(part > 0.5, down + 1.0, tl.where(part < 0.5, down, down + odd))
''', ()),
}


FUNCTIONS |= WORDS


TAKEN = {"tl", "triton", "INTERPRET", "NAN", *FUNCTIONS}   # names that a text has already


def used(names: set[str]) -> list[str]:
    """Sources of the functions of these names and of those that they need, in the table's order."""
    wanted = set(names)
    for n in names:
        wanted |= set(FUNCTIONS[n][1])
    return [source for n, (source, _) in FUNCTIONS.items() if n in wanted]
