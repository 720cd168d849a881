"""What the programs of tests/cases compute, written independently of them: loops and numpy in float64.

`CASES[name](rng)` -> (inputs, expected): arrays by tensor name, expected outputs and new states in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
Case = Callable[[np.random.Generator], tuple[Arrays, Arrays]]


def _attend(q: Any, k: Any, v: Any, seen: Callable[[int, int], bool] = lambda p, m: True,
            score: Callable[[float], float] = lambda s: s) -> tuple[Any, Any]:
    """One head, a query at a time: averages of v weighted by exp(score), and the log of the sum of weights."""
    out, lse = np.zeros((len(q), v.shape[1])), np.zeros(len(q))
    for p in range(len(q)):
        keys = [m for m in range(len(k)) if seen(p, m)]
        s = [score(sum(float(a) * float(b) for a, b in zip(q[p], k[m], strict=True))) for m in keys]
        top = max(s)
        w = [math.exp(x - top) for x in s]
        out[p] = sum(x * np.asarray(v[m], np.float64) for x, m in zip(w, keys, strict=True)) / sum(w)
        lse[p] = top + math.log(sum(w))
    return out, lse


def cascade(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    a, b = rng.uniform(0.5, 1.5, (2, 7))
    return {"A": a, "B": b}, {"Z": np.asarray(math.fsum(a) * math.fsum(x * y for x, y in zip(a, b, strict=True)))}


def attention(rng: np.random.Generator, keys: int = 10) -> tuple[Arrays, Arrays]:
    q, k, v = rng.normal(size=(3, 8)), rng.normal(size=(keys, 8)), rng.normal(size=(keys, 5))
    return {"Q": q, "K": k, "V": v}, {"AV": _attend(q, k, v)[0]}


def split_keys(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    inputs, out = attention(rng, 7)  # shares of 4, 3 and 0 keys
    return inputs, {"O": out["AV"]}


def layer_norm(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    x, g, b = rng.normal(size=(4, 6)), rng.normal(size=6), rng.normal(size=6)
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * g + b
    return {"X": x, "G": g, "B": b}, {"Y": y}


def causal_gqa(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    q, k, v = rng.normal(size=(2, 6, 3, 8)), rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 5))
    o = np.zeros((2, 6, 3, 5))
    for b in range(2):
        for h in range(6):
            o[b, h], _ = _attend(q[b, h], k[b, h // 3], v[b, h // 3], lambda p, m: m <= p + 4,
                                 lambda s: s / math.sqrt(8))
    return {"Q": q, "K": k, "V": v}, {"O": o}


def softcap_window(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    q, k, v = 9 * rng.normal(size=(5, 8)), rng.normal(size=(9, 8)), rng.normal(size=(9, 5))
    pos = np.array([0, 2, 8, 5, 3])
    o, _ = _attend(q, k, v, lambda p, m: pos[p] - 4 < m <= pos[p], lambda s: 30 * math.tanh(s / 30))
    return {"Q": q, "K": k, "V": v, "pos": pos}, {"O": o}


def attention_lse(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    q, k, v = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 6, 8)), rng.normal(size=(2, 6, 5))
    o, lse = zip(*(_attend(q[h], k[h], v[h]) for h in range(2)), strict=True)
    return {"Q": q, "K": k, "V": v}, {"O": np.array(o), "LSE": np.array(lse)}


def attention_backward(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Central differences of sum(O * dO) in float64."""
    x = {"Q": rng.normal(size=(2, 4, 8)), "K": rng.normal(size=(2, 4, 8)), "V": rng.normal(size=(2, 4, 5))}
    do = rng.normal(size=(2, 4, 5))

    def forward(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        heads = [_attend(q[h], k[h], v[h], lambda p, m: m <= p, lambda s: s / 4) for h in range(2)]
        return np.array([o for o, _ in heads]), np.array([e for _, e in heads])

    o, lse = forward(x["Q"], x["K"], x["V"])
    grads = {"d" + n: np.zeros_like(a) for n, a in x.items()}
    step = 1e-5
    for n, a in x.items():
        for at in np.ndindex(a.shape):
            ends = []
            for sign in (1, -1):
                moved = a.copy()
                moved[at] += sign * step
                ends.append(float((forward(**{m.lower(): moved if m == n else x[m] for m in x})[0] * do).sum()))
            grads["d" + n][at] = (ends[0] - ends[1]) / (2 * step)
    return {**x, "O": o, "LSE": lse, "dO": do}, grads


def int4_attention(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    heads, kv, p, m, width = 4, 2, 3, 7, 16

    def pack(x: Any) -> Any:
        words = np.zeros((*x.shape[:-1], x.shape[-1] // 8), np.uint32)
        for e in range(x.shape[-1]):
            words[..., e // 8] |= x[..., e].astype(np.uint32) << np.uint32(4 * (e % 8))
        return words.view(np.int32)  # the sign bit belongs to the eighth number

    kq, vq = rng.integers(0, 16, (2, kv, m, width))
    ks, vs = rng.uniform(0.01, 0.1, (kv, 2, width)), rng.uniform(0.01, 0.1, (kv, m, 2))
    kz, vz = rng.integers(0, 16, (kv, 2, width)), rng.integers(0, 16, (kv, m, 2))
    q = rng.normal(size=(heads, p, width))
    k = np.zeros((kv, m, width))
    v = np.zeros((kv, m, width))
    for j, t, e in np.ndindex(kv, m, width):
        k[j, t, e] = (int(kq[j, t, e]) - int(kz[j, t // 4, e])) * float(ks[j, t // 4, e])
        v[j, t, e] = (int(vq[j, t, e]) - int(vz[j, t, e // 8])) * float(vs[j, t, e // 8])
    o = np.array([_attend(q[h], k[h // 2], v[h // 2])[0] for h in range(heads)])
    return ({"Q": q, "KW": pack(kq), "KS": ks, "KZ": kz.astype(np.uint8), "VW": pack(vq), "VS": vs,
             "VZ": vz.astype(np.uint8)}, {"O": o})


def paged_decode(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    lengths, page = [5, 1, 8], 4  # the new token included: in mid-page, on a fresh page, at the end of one
    tables = [[6, 0], [3], [2, 5]]
    q = rng.normal(size=(3, 6, 8))
    kn, vn = rng.normal(size=(3, 2, 8)), rng.normal(size=(3, 2, 5))
    kc, vc = rng.normal(size=(7, page, 2, 8)), rng.normal(size=(7, page, 2, 5))
    k2, v2, o = kc.copy(), vc.copy(), np.zeros((3, 6, 5))
    for b, (n, table) in enumerate(zip(lengths, tables, strict=True)):
        at = table[(n - 1) // page], (n - 1) % page
        k2[at], v2[at] = kn[b], vn[b]
        keys = np.array([k2[table[t // page], t % page] for t in range(n)])
        values = np.array([v2[table[t // page], t % page] for t in range(n)])
        for h in range(6):
            o[b, h] = _attend(q[b, h][None], keys[:, h // 3], values[:, h // 3])[0][0]
    indptr = np.cumsum([0, *map(len, tables)])
    inputs = {"Q": q, "KN": kn, "VN": vn, "len": np.array(lengths), "indptr": indptr,
              "pages": np.array(sum(tables, []), np.int32), "KC": kc, "VC": vc}
    return inputs, {"O": o, "KC": k2, "VC": v2}


def product_key_bag(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    q, keys, values = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 12, 6)), rng.normal(size=(144, 5))
    o = np.zeros((3, 5))
    for t in range(3):
        scores = sorted(((float(q[0, t] @ keys[0, a] + q[1, t] @ keys[1, b]), a * 12 + b)
                         for a in range(12) for b in range(12)), reverse=True)[:3]  # of all pairs: no lists at all
        w = [math.exp(s - scores[0][0]) for s, _ in scores]
        o[t] = sum(x * values[i] for x, (_, i) in zip(w, scores, strict=True)) / sum(w)
    return {"Q1": q[0], "Q2": q[1], "K1": keys[0], "K2": keys[1], "VAL": values}, {"O": o}


def delta_rule(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Token by token, with the state of an earlier call."""
    n = 10  # two chunks and a half
    q, v = rng.normal(size=(2, n, 6)), rng.normal(size=(2, n, 5))
    k = rng.normal(size=(2, n, 6))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, s = rng.uniform(0, 1, (2, n)), rng.normal(size=(2, 6, 5))
    new, o = s.copy(), np.zeros((2, n, 5))
    for b in range(2):
        for t in range(n):
            new[b] += beta[b, t] * np.outer(k[b, t], v[b, t] - k[b, t] @ new[b])
            o[b, t] = q[b, t] @ new[b]
    return {"Q": q, "K": k, "V": v, "beta": beta, "M": s}, {"O": o, "M": new}


def append(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    old, new, order = rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.permutation(6)
    return {"KC": old, "KN": new, "order": order}, {"R": np.array([[*old, *new][i] for i in order])}


CASES: dict[str, Case] = {
    "append": append,
    "attention_1pass": attention,
    "attention_3pass": attention,
    "attention_backward": attention_backward,
    "attention_lse": attention_lse,
    "cascade_1": cascade,
    "cascade_2": cascade,
    "cascade_3": cascade,
    "causal_gqa": causal_gqa,
    "delta_rule": delta_rule,
    "int4_attention": int4_attention,
    "layer_norm": layer_norm,
    "paged_decode": paged_decode,
    "product_key_bag": product_key_bag,
    "softcap_window": softcap_window,
    "split_keys": split_keys,
}
