"""Which of an artifact's targets this machine is."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from memcomp.artifact.manifest import Machine
from memcomp.ir.detect import cpu
from memcomp.ir.errors import OptionError, Refusal, nearest


def chosen(targets: Sequence[Machine], where: str, name: str | None = None) -> tuple[int, tuple[str, ...]]:
    """The position of the target to take, and why each other one is not, in words.

    A GPU comes before the CPU, and among CPUs the one of most features; name: take this one.  OptionError for a name
    that is not there, Refusal where none can be taken.
    """
    if name is not None and name not in [t.name for t in targets]:
        raise OptionError(f"{where} has no target {name!r}", hint=nearest(name, [t.name for t in targets]))
    order = sorted((k for k, t in enumerate(targets) if name in (None, t.name)),
                   key=lambda k: (targets[k].device != "cuda", -len(targets[k].features), k))
    reasons = {k: why_not(targets[k]) for k in order}
    fit = [k for k in order if not reasons[k]]
    if not fit:
        raise Refusal(f"{where} does not run on this machine: " +
                      "; ".join(f"target {targets[k].name}: {reasons[k]}" for k in order),
                      hint="compile it for this machine too: `memcomp compile ... --target NAME`, several times")
    return fit[0], tuple(f"{targets[k].name}: {reasons[k] or 'it runs here too'}" for k in order if k != fit[0])


def why_not(t: Machine) -> str:
    """Why code for it does not run here; "" where it does."""
    if t.device == "cuda":
        return _no_gpu(t.capability)
    arch = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    if t.arch not in ("", arch):
        return f"it is for {t.arch}, this is {arch}"
    if t.system not in ("", platform.system().lower()):
        return f"it is for {t.system}, this is {platform.system().lower()}"
    missing = sorted(set(t.features) - set(cpu().features))
    return f"this processor lacks {', '.join(missing)}" if missing else ""


def _no_gpu(capability: int) -> str:
    try:
        from cuda.core import Device
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed (pip install memcomp[runtime-cuda])"
    try:
        there = {int(10 * d.compute_capability.major + d.compute_capability.minor) for d in Device.get_all_devices()}
    except Exception as error:  # without a driver, what is raised is not of one class
        return f"there is no GPU ({type(error).__name__})"
    has = f"this machine's GPUs have {', '.join(str(c / 10) for c in sorted(there))}" if there else "there is no GPU"
    return "" if capability in there else f"it is for compute capability {capability / 10}, {has}"
