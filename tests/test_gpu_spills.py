"""The mapping that is chosen spills no register: operators are mapped, emitted, compiled, and the machine code read.

Exceptions are those of the issue: D 256 on sm_80 and sm_89, MLA 576/512, values above 320.  `benchmarks/gpu_offline.py`
does the same for everything that comes with memcomp.
"""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_offline as bench
from memcomp.ir.target import target

pytest.importorskip("triton", reason="triton is not installed")
OPERATORS = tuple(f"operator {op.name}" for op in bench.operators())
WIDE = ("192", "256")
QUICK = (("operator documents D 64", "h100"), ("operator prefill_causal", "a100"))
SLOW = (pytest.mark.slow,)
EVERY = tuple((name, machine) for name in OPERATORS for machine in bench.TARGETS
              if "latent" not in name and not (name.endswith(WIDE) and machine != "h100"))


@pytest.mark.parametrize(("name", "machine"), [
    pytest.param(name, machine, marks=() if (name, machine) in QUICK else SLOW)
    for name, machine in EVERY])
def test_nothing_is_spilled(name: str, machine: str) -> None:
    told = bench.compiled(name, machine)
    assert "refused" not in told, told
    for launch in told["launches"]:
        assert launch["spills"] == 0, launch
        wide = any(n >= 64 for d, n in launch["tiles"].items() if d.startswith("p"))
        if machine == "h100" and wide and launch["instructions"]["HMMA"] + launch["instructions"]["HGMMA"]:
            assert launch["instructions"]["HGMMA"] and not launch["instructions"]["HMMA"], launch


def test_recorded_launches_fit_their_machine() -> None:
    """What `benchmarks/gpu_offline.py` last recorded: shared memory of every block, and registers stored nowhere but
    where it is stated."""
    found = json.loads(bench.RESULTS.read_text())
    assert {m.split()[0] for made in found.values() for m in made} == set(bench.TARGETS)
    for name, made in found.items():
        for machine, told in made.items():
            there = target(machine.split()[0]).level("smem").bytes
            for launch in told.get("launches", ()):
                assert launch["shared"] <= there, (name, machine, launch)


@pytest.mark.parametrize("machine", [pytest.param("a100", marks=pytest.mark.slow), "h100", "b200"])
def test_latent_decoding_takes_no_more_shared_memory_than_foretold(machine: str) -> None:
    """Rows of 576 are longer than a descriptor fetches."""
    (launch, *_) = bench.compiled("operator latent decode 576/512", machine)["launches"]
    assert launch["shared"] <= target(machine).level("smem").bytes
