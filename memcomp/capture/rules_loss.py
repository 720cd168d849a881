"""Losses over classes: log-sum-exp of a row less its element at the target, without a row of log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcomp.capture.masks import make
from memcomp.capture.reader import Reader, meta, real
from memcomp.capture.rules_attention import log_softmax
from memcomp.capture.rules_index import element
from memcomp.capture.rules_map import apply
from memcomp.capture.rules_reduce import reduced
from memcomp.capture.table import Rule
from memcomp.capture.value import Value, pointwise
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const

REAL = torch.float32


def nll_loss(r: Reader, node: fx.Node, x: Value, target: Value, weight: Value | None = None, size_average: Any = None,
             ignore_index: int = -100, reduce: Any = None, reduction: Any = "mean") -> Any:
    """-x[target], averaged over the rows whose target is not `ignore_index`; classes lie along dimension 1."""
    if size_average is not None or reduce is not None or weight is not None:
        raise Refusal("a loss with class weights or torch's old arguments")
    kind = {0: "none", 1: "mean", 2: "sum"}.get(reduction, reduction)
    d = min(1, len(x.dims) - 1)
    counts = pointwise(lambda t: make("ne", t, Const(ignore_index)), torch.bool, target)
    picked = element(r, real(x), d, target)
    rows = pointwise(lambda c, e: make("where", c, make("neg", e), Const(0.0)), x.dtype, counts, picked)
    if kind == "none":
        return rows
    dims = list(range(len(rows.dims)))
    total = reduced(r, rows, "sum", dims, False, "R") if dims else rows
    if kind == "sum":
        return total
    ones = pointwise(lambda c, _: make("where", c, Const(1.0), Const(0.0)), REAL, counts, rows)  # over the rows' ranks
    n = reduced(r, ones, "sum", dims, False, "R") if dims else ones
    return apply("div", x.dtype, total, n)


def _nll_loss(r: Reader, node: fx.Node, x: Value, target: Value, *args: Any, **kw: Any) -> Any:
    return nll_loss(r, node, x, target, *args, **kw)


def _cross_entropy(r: Reader, node: fx.Node, x: Value, target: Value, weight: Value | None = None,
                   size_average: Any = None, ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
                   label_smoothing: float = 0.0) -> Any:
    if target.is_real or label_smoothing:
        raise Refusal("a loss against probabilities", hint="target: one class per row, no label_smoothing")
    d = min(1, len(x.dims) - 1)
    return nll_loss(r, node, log_softmax(r, x, d, meta(node).dtype), target, weight, size_average, ignore_index, reduce,
                    reduction)


RULES: dict[str, Rule] = {
    "nll_loss": Rule("reduce", _nll_loss), "cross_entropy": Rule("reduce", _cross_entropy),
    "cross_entropy_loss": Rule("reduce", _cross_entropy),
}
