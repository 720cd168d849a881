"""One query a head over keys and values in codes: programs, and stored tensors with the numbers that they stand for.

Blocks of 32 tokens.  A word of 32 bits holds 32/bits numbers that a product sums over, channels of a token for keys
and tokens of a channel for values, two that follow one another 16 bits apart; words of neighbouring tokens (keys) or
channels (values) lie side by side.  So a register of words is a register of one number of each, shifted and masked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 32


def decode(bits: int, group: int, dim: int, *, by_channel: bool = True, adjacent: bool = False,
           out: str = "bf16") -> str:
    """A program: `group` query heads on each of J caches.  bits: of a number; 16 is bf16, stored as it is.

    by_channel: keys have a scale and a least value for each channel of a block (Liu et al., KIVI, arXiv 2402.02750),
    else for each token a scale alone; values have theirs for each token.  adjacent: numbers of a word one after the
    other, not 16 bits apart.
    """
    scale = dim ** -0.5
    tail = f"""S[j, g, b, t] = sum{{e}}: bf16 Q[j, g, e] * KD[j, b, t, e] * {scale!r}
GM[j, g] = max{{b, t}} S[j, g, b, t]
W[j, g, b, t] = exp(S[j, g, b, t] - GM[j, g])
D[j, g] = sum{{b, t}} W[j, g, b, t]
N[j, g, f] = sum{{b, t}} W[j, g, b, t] * VD[j, b, t, f]
O[j, g, f] = N[j, g, f] / D[j, g]
"""
    ranks = f"rank J\nrank G = {group}\nrank E = {dim}\nrank F = {dim}\n"
    if bits == 16:
        tail = tail.replace("b, t", "m").replace(": bf16", "").replace("KD", "K").replace("VD", "V")
        return (f"program decode_bf16\n{ranks}rank M\nin Q[J, G, E]: bf16\nin K[J, M, E]: bf16\nin V[J, M, F]: bf16\n"
                f"out O[J, G, F]: {out}\n{tail}")
    n, middle, least = 32 // bits, 0 if by_channel else 1 << (bits - 1), by_channel
    kept = "B, E" if by_channel else "B, T"

    def number(word: str, k: str) -> str:
        shift = f"{k} % {n} * {bits}" if adjacent else f"{k} % 2 * 16 + {k} % {n} // 2 * {bits}"
        code = f"({word} >> ({shift}) & {2**bits - 1})"
        return f"({code} - {middle})" if middle else code

    offsets = f"in KM[J, {kept}]: f16\nin VM[J, B, T]: f16\n" if least else ""
    at = kept.lower()
    return f"""program decode_{bits}
{ranks}rank B
rank T = {BLOCK}
rank EW = {dim // n}
rank TW = {BLOCK // n}
in Q[J, G, E]: bf16
in K[J, B, EW, T]: i32
in KS[J, {kept}]: f16
in V[J, B, TW, F]: i32
in VS[J, B, T]: f16
{offsets}out O[J, G, F]: {out}
KD[j, b, t, e] = {number(f"K[j, b, e // {n}, t]", "e")} * KS[j, {at}]{f" + KM[j, {at}]" if least else ""}
VD[j, b, t, f] = {number(f"V[j, b, t // {n}, f]", "t")} * VS[j, b, t]{" + VM[j, b, t]" if least else ""}
{tail}"""


def packed(x: Tensor, bits: int, dim: int, adjacent: bool = False) -> Tensor:
    """Numbers (int32) as words along a dim: that dim is 32/bits as short."""
    n = 32 // bits
    parts = x.reshape(*x.shape[:dim], -1, n, *x.shape[dim + 1:]).movedim(dim + 1, -1).to(torch.int64)
    shifts = [k * bits if adjacent else k % 2 * 16 + k // 2 * bits for k in range(n)]
    words = sum(parts[..., k] << s for k, s in enumerate(shifts))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def cached(bits: int, caches: int, keys: int, dim: int, *, by_channel: bool = True, adjacent: bool = False,
           seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs of `decode` without the query, of random numbers; and the keys and values that they stand for, (J, M, E)
    and (J, M, F) in bf16, as a cache without codes holds them."""
    g = torch.Generator().manual_seed(seed)
    blocks, half = math.ceil(keys / BLOCK), 1 << (bits - 1)
    made: dict[str, Tensor] = {}
    whole: list[Tensor] = []
    for t, along, by in (("K", 3, by_channel), ("V", 2, False)):
        codes = torch.randint(0, 2**bits, (caches, blocks, BLOCK, dim), generator=g, dtype=torch.int32)
        made[t] = packed(codes, bits, along, adjacent)
        if t == "K":
            made[t] = made[t].transpose(2, 3).contiguous()
        shape = (caches, blocks, dim) if by else (caches, blocks, BLOCK)
        s = ((0.5 + torch.rand(shape, generator=g)) / half).to(torch.float16)
        least = (-half * s).to(torch.float16)
        made[f"{t}S"] = s
        over = 2 if by else 3
        numbers = codes.float() * s.float().unsqueeze(over)
        if by_channel:
            made[f"{t}M"] = least
            numbers = numbers + least.float().unsqueeze(over)
        else:
            numbers = (codes.float() - half) * s.float().unsqueeze(over)
        whole.append(numbers.flatten(1, 2).to(torch.bfloat16))
    return made, whole[0], whole[1]
