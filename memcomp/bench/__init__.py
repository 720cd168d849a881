"""memcomp's kernels beside their rivals on this machine: `memcomp bench`.

All rivals of a case, and a probe of what the machine can do, take turns in one process on the same random data.  Every
result is compared with float64 before it is timed.  A ratio is claimed only where it is steady.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from memcomp.bench.held import allocated, scratch
from memcomp.bench.measure import Ratio, Times, machine, ratio, take_turns
from memcomp.bench.probes import PRODUCT, READ, product, reader
from memcomp.ir.errors import OptionError
from memcomp.models.bench import Case, Layer, Rival, cases

OWN = "memcomp"
SECONDS, FEWEST = 3.0, 7  # for the rounds of a case, and how many there are at least
INTENSE = 32  # operations a byte: above, products are the limit, below it, memory
EXACT = 1.5  # times the error of torch's own form
OLDER = 0.8  # times torch's own kernel that older instructions reach, where torch is held to them as well


@dataclass(frozen=True)
class Result:
    """One case: who took how long, erred how much (relative to float64) and held how many bytes besides inputs and
    outputs; `predicted`: what the cost model says of memcomp's; `missing`: rivals that do not run here, and why;
    `alone`: the time of a loop that reads as much over that of memcomp's kernels, where both are launched without
    torch.compile, whose own way to a kernel takes longest when a long cache has just been streamed."""

    case: str
    times: dict[str, Times]
    errors: dict[str, float]
    bars: dict[str, float]
    flops: float
    bytes: int
    held: dict[str, int]
    predicted: int
    missing: dict[str, str] = field(default_factory=dict)
    alone: Ratio | None = None

    def against(self, who: str) -> Ratio:
        """How many times faster memcomp is than the fastest of the rivals named in `who` (joined by " / ")."""
        found = [self.times[n] for n in who.split(" / ") if n in self.times]
        return ratio(min(found, key=lambda t: t.median), self.times[OWN])

    def missed(self) -> list[str]:
        """What is asked and surely not reached."""
        out = []
        for who, bar in self.bars.items():
            if any(n in self.times for n in who.split(" / ")):
                r = self.against(who)
                if r.sure and r.value < bar:
                    out.append(f"{r.value:.2f}x {who}, asked {bar:.2f}x")
        if self.inexact():
            out.append(f"error {self.errors[OWN]:.1e}, of torch's forms {self._torch_error():.1e}")
        return out

    def inexact(self) -> bool:
        return bool(self.errors[OWN] > EXACT * self._torch_error())

    def _torch_error(self) -> float:
        return min((e for n, e in self.errors.items() if n != OWN), default=float("inf"))

    def json(self) -> dict[str, Any]:
        ratios = {n: asdict(ratio(t, self.times[OWN])) for n, t in self.times.items() if n != OWN}
        return {**asdict(self), "ratios": ratios, "missed": self.missed()}

    def lines(self) -> Iterator[str]:
        """What is printed: a line for each who took part, then what was missed."""
        yield self.case
        limit = self.times.get(PRODUCT) or self.times.get(READ)
        for n, t in self.times.items():
            words = [f"{t.median * 1e3:10.3f} ms +- {t.spread:4.0%}"]
            if n in self.errors:
                words.append(f"error {self.errors[n]:.1e}")
                words.append(f"holds {self.held[n] / 2**20:.1f} MiB")
            if n == OWN:
                words[-1] += f" ({self.predicted / 2**20:.1f} predicted)"
                words.append(f"{self.flops / t.median / 1e9:.0f} GFLOP/s, {self.bytes / t.median / 1e9:.1f} GB/s")
                if limit is not None:
                    words.append(f"{limit.median / t.median:.0%} of {PRODUCT if PRODUCT in self.times else READ}")
                if self.alone is not None:
                    words.append(f"its kernels alone {self.alone} {READ}")
            else:
                r, bar = ratio(t, self.times[OWN]), [b for who, b in self.bars.items() if n in who.split(" / ")]
                words.append(f"memcomp {r}" + "".join(f", asked {b:.2f}x" for b in bar))
            yield f"  {n:<20}" + "  ".join(words)
        yield from (f"  {n:<20}not run: {why}" for n, why in self.missing.items())
        yield from (f"  missed: {m}" for m in self.missed())


def measure(case: Case, rounds: int = 31, rivals: bool = True, target: str = "cpu") -> Result:
    """Time one case: at most `rounds` turns, fewer where they take long.

    rivals: or memcomp and the probe alone; target: that memcomp compiles for.
    """
    torch._dynamo.reset()
    args = case.inputs()
    calls: dict[str, Callable[[], object]] = {}
    outs: dict[str, Any] = {}
    missing: dict[str, str] = {}
    forms = {OWN: Rival(lambda *_: case.fn, "memcomp"), **(case.rivals if rivals else {})}
    for name, rival in forms.items():
        try:
            f = compiled(rival, args, {**case.options, "target": target})
            outs[name] = f(*args)
        except Exception as why:
            if name == OWN:
                raise
            missing[name] = f"{type(why).__name__}: {str(why).strip().splitlines()[0][:200]}"
            continue
        calls[name] = _call(f, args)
    moved = sum(t.numel() * t.element_size() for t in tree_leaves((args, outs[OWN])) if isinstance(t, torch.Tensor))
    exact = (case.exact or case.fn)(*tree_map(_double, args))
    errors = {n: _error(out, exact) for n, out in outs.items() if not n.startswith("own ")}
    held = {n: allocated(calls[n]) for n in errors}
    own, predicted = scratch(case.fn, args, target)
    held[OWN] += own
    if case.flops / moved > INTENSE:
        calls[PRODUCT] = product(args[0].dtype, case.flops)
    else:
        calls[READ] = reader(moved)
    bars = dict(case.bars) if target == "cpu" else {n: OLDER for n in case.bars if n == "SDPA"}
    begin = time.perf_counter()
    for call in calls.values():
        call()
    took = time.perf_counter() - begin
    rounds = max(FEWEST, min(rounds, int(SECONDS / took)))
    times = take_turns(calls, rounds, warm=2)
    alone = None
    if READ in calls:
        bare = take_turns({OWN: launches(calls[OWN]), READ: calls[READ]}, rounds, warm=2)
        alone = ratio(bare[READ], bare[OWN])
    return Result(case.name, times, errors, bars, case.flops, moved, held, predicted, missing, alone)


def launches(call: Callable[[], object]) -> Callable[[], None]:
    """The kernels that a call launches, and nothing else of it; the results go where the first call's went."""
    from memcomp import runtime

    seen: list[tuple[Callable[..., Any], list[Any]]] = []

    def watched(entry: runtime.Entry, inputs: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        outs, args = entry.prepare(inputs, sizes)
        seen.append((entry.kernel, args))
        entry.kernel(*args)
        return outs

    run, runtime.run = runtime.run, watched
    try:
        call()
    finally:
        runtime.run = run

    def again() -> None:
        for kernel, args in seen:
            kernel(*args)

    return again


def named(only: Sequence[str] = ()) -> list[Case]:
    """The cases whose name holds one of the words, all without words; OptionError where there is none."""
    chosen = [c for c in cases() if not only or any(w in c.name for w in only)]
    if not chosen:
        raise OptionError(f"no case is named like {', '.join(map(repr, only))}", hint="`memcomp bench --list`")
    return chosen


def run(only: Sequence[str] = (), rounds: int = 31, done: Callable[[Result], None] = lambda _: None,
        target: str = "cpu") -> list[Result]:
    """Measure the `named` cases, and tell of each when it is done."""
    chosen, out = named(only), []
    with torch.inference_mode():
        for case in chosen:
            out.append(measure(case, rounds, target=target))
            done(out[-1])
    return out


def compiled(rival: Rival, args: Sequence[Any], options: Mapping[str, Any]) -> Layer:
    f = rival.made(*args)
    if rival.compiler == "memcomp":
        return torch.compile(f, backend="memcomp", dynamic=False,
                             options={"rest": "eager", "strict": True, **options})
    return torch.compile(f, dynamic=False) if rival.compiler else f


def _call(f: Layer, args: Sequence[Any]) -> Callable[[], object]:
    return lambda: f(*args)


def _double(t: Any) -> Any:
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def _error(out: Any, exact: Any) -> float:
    """The largest relative error of the results, in the 2-norm."""
    pairs = zip(tree_leaves(out), tree_leaves(exact), strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def written(results: Sequence[Result]) -> str:
    """JSON: the machine's features, the versions, and every result."""
    return json.dumps({"machine": machine(), "results": [r.json() for r in results]}, indent=1) + "\n"
