"""`memcomp bench`: rivals in turn, probes that do what they say, no claim without ground."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memcomp
from memcomp.__main__ import main
from memcomp.bench import OWN, Result, launches, measure, run, written
from memcomp.bench.held import allocated, scratch
from memcomp.bench.measure import Times, ratio
from memcomp.bench.probes import PRODUCT, READ, product, reader
from memcomp.ir.errors import OptionError
from memcomp.models._inputs import qkv
from memcomp.models.bench import Case, Rival, cases, fixed
from memcomp.models.families import families
from memcomp.models.families.attention import causal, scaled

pytestmark = pytest.mark.usefixtures("fresh")


def inputs() -> tuple[Tensor, ...]:
    return qkv(1, 2, 2, 40, 70, 16)


def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise ValueError("no such layer")


def test_a_case_is_measured_whole() -> None:
    rivals = {"eager": Rival(fixed(scaled)), "own causal": Rival(fixed(causal), "memcomp"),
              "broken": Rival(fixed(broken))}
    case = Case("small", scaled, inputs, rivals, {"eager": 1.0, "broken": 2.0}, 4.0 * 2 * 40 * 70 * 16)
    with torch.inference_mode():
        result = measure(case, rounds=7)
    assert set(result.times) == {OWN, "eager", "own causal", READ} and set(result.errors) == {OWN, "eager"}
    assert "no such layer" in result.missing["broken"]
    assert result.bytes == 4 * sum(t.numel() for t in inputs()) + 4 * 2 * 40 * 16
    assert result.held[OWN] > 0 and result.predicted > 0
    (stored,) = json.loads(written([result]))["results"]
    assert stored["case"] == "small" and stored["ratios"].keys() == set(result.times) - {OWN}
    assert "small" in "\n".join(result.lines()) and stored["alone"]["value"] > 0


def test_the_kernels_of_a_call_alone_do_what_the_call_does() -> None:
    """Each launch of it, and nothing that torch.compile does around them."""
    args = inputs()
    f = torch.compile(scaled, backend="memcomp", dynamic=False, options={"rest": "eager", "strict": True})
    with torch.inference_mode():
        want, before = f(*args), memcomp.stats()["launches"]
        made: list[Tensor] = []
        again = launches(lambda: made.append(f(*args)))
        made[0].zero_()
        again()
    torch.testing.assert_close(made[0], want)
    assert memcomp.stats()["launches"] == before


def test_what_is_missed_is_said_only_where_it_is_sure() -> None:
    steady, unsteady = Times(2.0, 1.9, 0.05), Times(2.0, 1.0, 0.6)

    def result(own: Times, error: float) -> Result:
        return Result("c", {OWN: own, "peer": steady, "slow": Times(9.0, 8.9, 0.01)}, {OWN: error, "peer": 1e-7},
                      {"peer / slow": 1.5, "absent": 3.0}, 1.0, 1, {}, 0)

    assert result(steady, 1e-7).against("peer / slow").value == 1.0
    assert len(result(steady, 1e-7).missed()) == 1 and not result(Times(1.0, 0.96, 0.01), 1e-7).missed()
    assert not result(unsteady, 1e-7).missed() and not ratio(steady, unsteady).sure
    assert "error" in result(Times(1.0, 0.96, 0.01), 2e-7).missed()[0]


def test_every_case_makes_its_inputs_and_names_its_rivals() -> None:
    names = [c.name for c in cases()]
    assert len(names) == len(set(names))
    for c in cases():
        for who in c.bars:
            assert all(n == READ or n in c.rivals for n in who.split(" / ")), c.name
        assert c.flops > 0


@pytest.mark.parametrize("size", [1 << 18, 3_000_000])
def test_the_read_probe_reads_everything_once(size: int) -> None:
    reader(size)()  # asserts the sum of what it read


def test_the_product_probe_has_the_operations_of_the_case() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for flops in (1e7, 5e9):
        with FlopCounterMode(display=False) as counted:
            product(torch.float32, flops)()
        assert math.isclose(counted.get_total_flops(), flops, rel_tol=0.2)


def test_held_is_the_most_at_a_time() -> None:
    x = torch.randn(1 << 18)

    def two() -> Tensor:
        a = x + 1
        b = a * 2
        return b.sum()

    size = x.numel() * 4
    assert 2 * size <= allocated(two) < 2.5 * size and allocated(lambda: x + 1) < size // 8


@pytest.mark.parametrize("name", ["scaled", "causal", "documents", "RMS of queries and keys", "grouped heads",
                                  "rms_norm", "cross_entropy", "entropy"])
def test_kernels_hold_no_more_than_the_cost_model_says(name: str) -> None:
    (family,) = (f for f in families() if f.name == name)
    with torch.inference_mode():
        own, predicted = scratch(family.fn, family.inputs(96, 512, torch.float32))
    assert 0 < own <= predicted


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [c.name for c in cases()]
    assert main(["bench", "--list", "--json", "decode bf16"]) == 0
    assert json.loads(capsys.readouterr().out) == [c.name for c in cases() if "decode bf16" in c.name]
    assert main(["bench", "no such case"]) == 2 and "--list" in capsys.readouterr().err
    assert main(["bench", "--rounds", "1"]) == 2
    path = tmp_path / "out.json"
    name = "decode f32 group 4 dim 128 keys 2048"
    assert main(["bench", name, "--rounds", "2", "-o", str(path)]) == 0
    assert name in capsys.readouterr().out and json.loads(path.read_text())["results"][0]["case"] == name


def test_unknown_words_are_an_error() -> None:
    with pytest.raises(OptionError, match="no case"):
        run(["nothing like it"])


def test_products_are_the_probe_of_intense_cases() -> None:
    case = Case("intense", scaled, lambda: qkv(1, 1, 1, 512, 512, 64), flops=4.0 * 512 * 512 * 64)
    with torch.inference_mode():
        assert PRODUCT in measure(case, 2).times
