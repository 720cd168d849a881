"""Chains of reductions without attention: losses, norms in front of a product, statistics, choices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memcomp.models._inputs import normal
from memcomp.models.families import Family, Inputs

MODEL, HEADS = 32, 4


def shaped(*shapes: str) -> Inputs:
    """Standard normal inputs; a shape is spelled "R L": R rows, L the long rank, D features, O outputs; HL is H * L."""
    def make(rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        size = {"R": rows, "L": length, "D": MODEL, "O": 24, "H": HEADS, "C": 2 * HEADS}
        return normal(*(tuple(math.prod(size[x] for x in word) for word in s.split()) for s in shapes), dtype=dtype)

    return make


def labelled(make: Inputs, ignore: int | None = None) -> Inputs:
    """The inputs of `make` and a class below the long rank for every row; some rows hold `ignore`."""
    def more(rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        target = torch.randint(length, (rows,), generator=torch.Generator().manual_seed(2))
        if ignore is not None:
            target[::3] = ignore
        return (*make(rows, length, dtype), target)

    return more


def peaked(make: Inputs) -> Inputs:
    """The inputs of `make`, the first one with a few clear peaks a row, so that its order survives rounding."""
    def more(rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, *rest = make(rows, length, dtype)
        where = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(row))[:6]
                             for row in range(rows)])
        return (x.clamp(max=0).scatter(-1, where, (torch.arange(6) / 2 + 0.5).to(dtype).expand(rows, 6)), *rest)

    return more


def shifted(make: Inputs) -> Inputs:
    """The inputs of `make`, the first one around 1, so that its mean is no small difference of large sums."""
    def more(rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, *rest = make(rows, length, dtype)
        return (x + 1, *rest)

    return more


def masked(make: Inputs, at: int) -> Inputs:
    """The inputs of `make` and a truth value per element of input `at`; every row keeps some."""
    def more(rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out = make(rows, length, dtype)
        mask = torch.rand(out[at].shape, generator=torch.Generator().manual_seed(3)) < 0.7
        mask[..., 0] = True
        return (*out, mask)

    return more


# -- entropy, log-sum-exp, losses ----------------------------------------------------------------------------------


def entropy(x: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    return -(p * torch.log(p)).sum(-1)


def entropy_of_logs(x: Tensor) -> Tensor:
    logs = torch.log_softmax(x, -1)
    return -(logs.exp() * logs).sum(-1)


def log_sum_exp(x: Tensor, w: Tensor) -> Tensor:
    return torch.logsumexp(x @ w.T, -1)


def log_probability(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(F.linear(x, w), -1).gather(-1, target[:, None])[:, 0]


def cross_entropy(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T, target, reduction="none")


def cross_entropy_mean(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T, target)


def cross_entropy_ignoring(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target, ignore_index=-100, reduction="none")


# -- norms folded into the product that follows --------------------------------------------------------------------


def rms_norm(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return (x * scale * gain) @ w.T


def rms_norm_function(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, (x.shape[-1],), gain, 1e-6), w)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, (x.shape[-1],), gain, bias, 1e-5), w)


def layer_norm_written_out(x: Tensor, gain: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    return ((x - mean) / torch.sqrt(var + 1e-5) * gain + bias) @ w.T


def group_norm(x: Tensor, gain: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    """Groups of features, a normalised one into a product of its own (a grouped linear layer)."""
    return torch.einsum("rgl,gol->rgo", F.group_norm(x, x.shape[1], gain, bias, 1e-5), w)


def group_norm_joined(x: Tensor, gain: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    """One product over all groups: each of them is finished with its own mean and spread, then they are summed."""
    return F.group_norm(x, HEADS, gain, bias, 1e-5) @ w.T


def group_norm_written_out(x: Tensor, w: Tensor) -> Tensor:
    y = x.reshape(x.shape[0], HEADS, -1)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + 1e-5)
    return y.reshape(x.shape) @ w.T


def group_norm_of_channels(x: Tensor, w: Tensor) -> Tensor:
    """Groups of channels, each of them long; the product sums over a channel alone."""
    return F.group_norm(x, HEADS) @ w.T


def group_norm_flattened(x: Tensor, w: Tensor) -> Tensor:
    return F.group_norm(x, HEADS).flatten(1) @ w.T


def l2_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ w.T


# -- statistics ----------------------------------------------------------------------------------------------------


def mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1), x.var(-1)


def skew(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    return (centred**3).mean(-1) / centred.square().mean(-1) ** 1.5


def masked_mean_variance(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    n = keep.sum(-1)
    mean = torch.where(keep, x, 0.0).sum(-1) / n
    return mean, torch.where(keep, (x - mean[:, None]).square(), 0.0).sum(-1) / n


def weighted_mean_variance(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    w = weight.square()
    total = w.sum(-1)
    mean = (w * x).sum(-1) / total
    return mean, (w * (x - mean[:, None]).square()).sum(-1) / total


def softmax_variance(x: Tensor, y: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    mean = (p * y).sum(-1, keepdim=True)
    return (p * (y - mean).square()).sum(-1)


def kernel_regression(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Nadaraya-Watson with a Gaussian kernel."""
    distance = (x[:, None, :] - known[None]).square().sum(-1)
    weight = torch.exp(-distance / 8.0)
    return weight @ values / weight.sum(-1, keepdim=True)


# -- choices -------------------------------------------------------------------------------------------------------


def top_renormalised(x: Tensor) -> tuple[Tensor, Tensor]:
    value, index = torch.topk(torch.softmax(x, -1), 4, -1)
    return value / value.sum(-1, keepdim=True), index


def likeliest(x: Tensor) -> Tensor:
    return torch.softmax(x, -1).argmax(-1)


def gated_pick(x: Tensor, y: Tensor) -> Tensor:
    best = torch.sigmoid(x).argmax(-1, keepdim=True)
    return y.gather(-1, best)[:, 0]


# -- two passes ----------------------------------------------------------------------------------------------------


def softmax_written(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def layer_norm_written(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-5)


def softmax_of_z_scores(x: Tensor, v: Tensor) -> Tensor:
    z = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    return torch.softmax(z, -1) @ v


def _family(fn: Callable[..., object], make: Inputs, long: tuple[int, int] = (0, 1), *,
            also: tuple[tuple[int, int], ...] = (), kernels: int = 1, passes: int = 1, why: str = "") -> Family:
    return Family(fn.__name__, fn, make, (long, *also), ((0, 0),), kernels, passes, why)


_head, _row, _pair = shaped("R D", "L D"), shaped("R L"), shaped("R L", "R L")
_WRITTEN = "the normalised tensor itself is written: each element needs what all of them made"

FAMILIES: tuple[Family, ...] = (
    _family(entropy, _row),
    _family(entropy_of_logs, _row),
    _family(log_sum_exp, _head, (1, 0)),
    _family(log_probability, labelled(_head), (1, 0)),
    _family(cross_entropy, labelled(_head), (1, 0)),
    _family(cross_entropy_mean, labelled(_head), (1, 0), kernels=2,
            why="the mean over rows follows the loss of every row"),
    _family(cross_entropy_ignoring, labelled(_head, -100), (1, 0)),
    _family(rms_norm, shaped("R L", "L", "O L"), also=((1, 0), (2, 1))),
    _family(rms_norm_function, shaped("R L", "L", "O L"), also=((1, 0), (2, 1))),
    _family(layer_norm, shaped("R L", "L", "L", "O L"), also=((1, 0), (2, 0), (3, 1))),
    _family(layer_norm_written_out, shaped("R L", "L", "L", "O L"), also=((1, 0), (2, 0), (3, 1))),
    _family(group_norm, shaped("R H L", "H", "H", "H O L"), (0, 2), also=((3, 2),)),
    _family(group_norm_joined, shaped("R HL", "HL", "HL", "O HL"), also=((1, 0), (2, 0), (3, 1))),
    _family(group_norm_written_out, shaped("R HL", "O HL"), also=((1, 1),)),
    _family(group_norm_of_channels, shaped("R C L", "O L"), (0, 2), also=((1, 1),)),
    _family(group_norm_flattened, shaped("R C L", "O CL"), (0, 2), also=((1, 1),)),
    _family(l2_norm, shaped("R L", "O L"), also=((1, 1),)),
    _family(mean_variance, shifted(_row)),
    _family(skew, _row),
    _family(masked_mean_variance, masked(shifted(_row), 0)),
    _family(weighted_mean_variance, shifted(_pair), also=((1, 1),)),
    _family(kernel_regression, shaped("R D", "L D", "L O"), (1, 0), also=((2, 0),)),
    _family(top_renormalised, peaked(_row)),
    _family(likeliest, peaked(_row)),
    _family(gated_pick, peaked(_pair), also=((1, 1),)),
    _family(softmax_written, _row, kernels=2, passes=2, why=_WRITTEN),
    _family(layer_norm_written, _row, kernels=2, passes=2, why=_WRITTEN),
    _family(softmax_variance, _pair, also=((1, 1),)),
    _family(softmax_of_z_scores, shaped("R L", "L O"), kernels=2, passes=2, also=((1, 0),),
            why="exponentials of x divided by a spread of all x"),
)
