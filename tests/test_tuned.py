"""What the cache knows decides how a program is mapped; nothing else of it does."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memcomp
from memcomp.cache import CacheWarning, Choice, Entry, Measured, Store, environment
from memcomp.config import Config
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program, knobs
from memcomp.pipeline import Compiled, compile_program, forget
from memcomp.tune.space import Space

pytestmark = pytest.mark.usefixtures("fresh", "no_grad")


def made(config: Config, **sizes: int) -> Compiled:
    forget()
    return compile_program(program(), config=config, sizes=sizes)


def program() -> Program:
    from memcomp.ir.text import parse

    return parse((Path(__file__).parent / "cases" / "attention_3pass.mc").read_text())


def entry(of: Compiled, choice: Choice) -> Entry:
    return Entry(of.problem, environment("cpu"), choice, Measured(1e-3, 0.1, 9, 0.5, 1.0, 2e-3))


def space_of(compiled: Compiled, config: Config) -> Space:
    seen: dict[str, Any] = {}
    forget()
    compile_program(program(), config=config, observe=seen.__setitem__)
    return Space({"": seen["partition"]})


def another(compiled: Compiled) -> Choice:
    space = space_of(compiled, Config(tune="off"))
    return next(c for c in space.choices() if c.knobs != compiled.choice.knobs)


def test_a_measured_choice_is_taken(tmp_path: Path) -> None:
    plain = made(Config(tune="off"))
    other = another(plain)
    Store(tmp_path).put(entry(plain, other))
    tuned = made(Config(cache_dir=str(tmp_path)))
    assert tuned.choice == other and tuned.problem == plain.problem
    assert "by measurement: 0.001 s" in tuned.program.proofs[-1]
    assert tuned.program != plain.program and not knobs(tuned.program)
    assert made(Config(cache_dir=str(tmp_path), tune="off")).choice == plain.choice
    assert made(Config(cache_dir=str(tmp_path), cache="off")).choice == plain.choice
    assert made(Config(cache_dir=str(tmp_path / "empty"))).choice == plain.choice


@pytest.mark.parametrize("change", ["environment", "problem", "size"])
def test_what_was_measured_for_something_else_is_not_taken(tmp_path: Path, change: str) -> None:
    plain = made(Config(tune="off"), M=100, P=100)
    e = entry(plain, another(plain))
    if change == "environment":
        e = replace(e, environment={**e.environment, "code": "another"})
    elif change == "problem":
        e = replace(e, problem={**e.problem, "program": "another"})
    Store(tmp_path).put(e)
    far = 5000 if change == "size" else 100
    assert made(Config(cache_dir=str(tmp_path)), M=far, P=100).choice == plain.choice
    if change == "size":
        assert made(Config(cache_dir=str(tmp_path)), M=120, P=100).choice == e.choice, "near enough"


def test_a_choice_that_is_no_member_is_not_taken_and_told(tmp_path: Path) -> None:
    plain = made(Config(tune="off"))
    Store(tmp_path).put(entry(plain, Choice("", {n: 7 for n in plain.choice.knobs})))
    with pytest.warns(CacheWarning, match="is not used"):
        assert made(Config(cache_dir=str(tmp_path))).choice == plain.choice
    Store(tmp_path).put(entry(plain, replace(plain.choice, backend="nobody")))
    with pytest.warns(CacheWarning, match="nobody"):
        assert made(Config(cache_dir=str(tmp_path))).choice == plain.choice
    Store(tmp_path).put(entry(plain, replace(plain.choice, form="64 shares")))  # sizes near these may have it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(Config(cache_dir=str(tmp_path))).choice == plain.choice


def test_every_member_of_the_space_and_nothing_else_has_a_program() -> None:
    plain = made(Config(tune="off"))
    space = space_of(plain, Config(tune="off"))
    members = list(space.choices())
    assert len(members) == len(space) and plain.choice in members
    programs = {str(space.closed(c)) for c in members}
    assert len(programs) == len(members)
    for wrong in (Choice("another"), Choice("", {}), Choice("", {n: 3 for n in plain.choice.knobs}),
                  Choice("", {**plain.choice.knobs, "more": 1})):
        with pytest.raises(OptionError):
            space.closed(wrong)


def test_a_compiled_function_takes_it(tmp_path: Path) -> None:
    """Through torch.compile, and the results stay the same."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.randn(3, 1, 2, 70, 16).unbind()
    report = memcomp.explain(attend, q, k, v, tune="off")
    read, known = report.regions[0].read, report.regions[0].known
    forget()
    seen: dict[str, Any] = {}
    plain = compile_program(read, config=Config(tune="off"), sizes=known, observe=seen.__setitem__)
    space = Space({plain.choice.form: seen["partition"]})
    other = next(c for c in space.choices() if c.knobs != plain.choice.knobs)
    Store(tmp_path).put(entry(plain, other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = memcomp.explain(attend, q, k, v, cache="on", cache_dir=str(tmp_path))
        assert any("by measurement" in line for line in found.regions[0].program.proofs)
        g = torch.compile(attend, backend="memcomp", options={
            "cache": "on", "cache_dir": str(tmp_path), "strict": True})
        torch.testing.assert_close(g(q, k, v), attend(q, k, v))


def test_what_one_cache_says_does_not_decide_for_another(tmp_path: Path) -> None:
    """Without `forget`: a process that compiles with one cache, then with another, or with none."""
    from memcomp.ir.text import parse

    text = str(program()).replace("rank P", "rank P = 100").replace("rank M", "rank M = 100")
    p = parse(text)  # of fixed sizes: no bucket tells them apart
    forget()
    plain = compile_program(p, config=Config(tune="off"))
    seen: dict[str, Any] = {}
    compile_program(p, config=Config(tune="off"), observe=seen.__setitem__)
    other = next(c for c in Space({plain.choice.form: seen["partition"]}).choices() if c != plain.choice)
    Store(tmp_path / "a").put(entry(plain, other))
    Store(tmp_path / "b").put(replace(entry(plain, plain.choice), measured=Measured(2e-3, 0.1, 9, 0.5, 1.0)))
    a, b = (Config(cache_dir=str(tmp_path / x)) for x in "ab")
    for c, choice in ((a, other), (b, plain.choice), (replace(a, cache="off"), plain.choice), (a, other)):
        assert compile_program(p, config=c).choice == choice


SHIPPED = """
import sys
from pathlib import Path
import memcomp
from memcomp.cache import Choice, Entry, Measured, Store, environment, layers, shipped
from memcomp.config import config
from memcomp.ir.text import parse
from memcomp.pipeline import compile_program, forget, tunable

read, tuned = parse(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
assert Path(memcomp.__file__).parent.samefile(tuned.parent) and shipped().root.samefile(tuned)
opened = tunable(read, config=config({"tune": "off"}), sizes={})
other = next(c for c in opened.space.choices() if c.knobs != opened.modelled.knobs)
entry = Entry(opened.problem, environment("cpu"), other, Measured(1e-3, 0.1, 9, 0.5, 1.0))
Store(tuned).put(entry)
before = sorted((p, p.stat().st_mtime_ns) for p in tuned.rglob("*"))
assert compile_program(read, config=config()).choice == other, "the defaults find it"
for mode in ("on", "read"):
    *_, last = layers(mode=mode).stores
    try:
        last.put(entry)
    except PermissionError:
        continue
    raise AssertionError("it was written")
nearest = layers().writable
assert nearest is not None and nearest.root != tuned
nearest.put(Entry(opened.problem, environment("cpu"), opened.modelled, Measured(1e-3, 0.1, 9, 0.5, 1.0)))
forget()
assert compile_program(read, config=config()).choice == opened.modelled, "what was measured here is nearer"
assert sorted((p, p.stat().st_mtime_ns) for p in tuned.rglob("*")) == before
"""


def test_what_ships_with_the_package_is_found_and_never_written(tmp_path: Path) -> None:
    """A package like this one, with an entry in its folder `tuned`."""
    package = tmp_path / "lib" / "memcomp"
    package.mkdir(parents=True)
    for part in Path(memcomp.__file__).parent.iterdir():
        if part.name not in ("tuned", "__pycache__"):
            (package / part.name).symlink_to(part.resolve() if part.is_file() else part)
    (package / "tuned").mkdir()
    env = {n: x for n, x in os.environ.items() if not n.startswith("MEMCOMP_")} | {
        "PYTHONPATH": str(package.parent), "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_CONFIG_DIRS": str(tmp_path / "none")}
    case = Path(__file__).parent / "cases" / "attention_3pass.mc"
    done = subprocess.run([sys.executable, "-c", SHIPPED, str(case), str(package / "tuned")], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_choice_of_another_backend_than_was_asked_for_is_not_taken(tmp_path: Path) -> None:
    forget()
    asked = Config(backend="tvm", tune="off")
    plain = compile_program(program(), config=asked)
    e = entry(plain, replace(plain.choice, backend="python"))
    Store(tmp_path).put(e)
    forget()
    with pytest.warns(CacheWarning, match="python"):
        found = compile_program(program(), config=replace(asked, tune="cached", cache_dir=str(tmp_path)))
    assert found.kernel.backend == "tvm"
