"""Flash attention as one would write it in Triton by hand: pointers, two loops where it is causal, nothing else.

A rival, not a part of memcomp: it says what the language gives without a compiler above it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128


@triton.jit
def _attend(q, k, v, out, scale, heads, group, rows, keys,
            qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on,
            D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    at, head = tl.program_id(0) * ROWS, tl.program_id(1)
    b, h = head // heads, head % heads
    r, c, n = at + tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, KEYS)
    inside = c < D
    x = tl.load(q + b.to(tl.int64) * qb + h * qh + r[:, None] * qn + c[None, :],
                mask=(r[:, None] < rows) & inside[None, :], other=0.0)
    k += b.to(tl.int64) * kb + (h // group) * kh + c[:, None]
    v += b.to(tl.int64) * vb + (h // group) * vh + c[None, :]
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    whole = at // KEYS * KEYS if CAUSAL else keys // KEYS * KEYS  # no key before it is masked
    end = min(keys, at + ROWS) if CAUSAL else keys
    for m in range(0, whole, KEYS):
        kt = tl.load(k + (m + n)[None, :] * kn, mask=inside[:, None], other=0.0)
        s = tl.dot(x, kt) * scale
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        vt = tl.load(v + (m + n)[:, None] * vn, mask=inside[None, :], other=0.0)
        acc = tl.dot(p.to(vt.dtype), vt, acc * shrink[:, None])
        top = new
    for m in range(whole, end, KEYS):
        seen = m + n < keys
        kt = tl.load(k + (m + n)[None, :] * kn, mask=inside[:, None] & seen[None, :], other=0.0)
        s = tl.dot(x, kt) * scale
        s = tl.where(seen[None, :] & ((m + n)[None, :] <= r[:, None]) if CAUSAL else seen[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        vt = tl.load(v + (m + n)[:, None] * vn, mask=inside[None, :] & seen[:, None], other=0.0)
        acc = tl.dot(p.to(vt.dtype), vt, acc * shrink[:, None])
        top = new
    tl.store(out + b.to(tl.int64) * ob + h * oh + r[:, None] * on + c[None, :],
             (acc / total[:, None]).to(out.dtype.element_ty), mask=(r[:, None] < rows) & inside[None, :])


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q (B, H, P, D), k and v (B, J, M, D), J dividing H, columns next to one another; causal: P = M."""
    if not q.is_cuda:  # the interpreter multiplies the bit patterns of bf16
        return _flash(q.float(), k.float(), v.float(), causal).to(q.dtype)
    return _flash(q, k, v, causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    batch, heads, rows, dim = q.shape
    out = torch.empty_like(q)
    new = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9
    keys = 128 if new and dim <= 128 else 64 if dim <= 128 else 32
    _attend[(triton.cdiv(rows, ROWS), batch * heads)](
        q, k, v, out, dim**-0.5 * 1.4426950408889634, heads, heads // k.shape[1], rows, k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        D=dim, WIDE=triton.next_power_of_2(dim), ROWS=ROWS, KEYS=keys, CAUSAL=causal, num_warps=8, num_stages=2)
    return out
