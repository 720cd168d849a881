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
    "xlogx": ('''\
@triton.jit
def xlogx(x):
    return tl.where(x == 0.0, 0.0, x * tl.log(x))
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
