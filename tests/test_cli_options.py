"""Every command and every option of the command line: what it prints, asked of a table; an option that is not in the
table fails.  Lines are run in this process; what would take long (tuning, timing, the demo) is done by a stand-in."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from memcomp.__main__ import main
from memcomp.cache import Choice, Entry, Measured, Store
from memcomp.cache.transfer import exported
from memcomp.cli.parser import CODES, Parser, parser
from tests.test_cli import PROGRAM as WEIGH

ROOT = Path(__file__).resolve().parent.parent
MINE = """import torch
from torch import nn

def attend(q, k, v, scale: float = 0.125):
    return torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v

def make(scale):
    return lambda q, k, v: attend(q, k, v, scale)

def build(keys=24, dtype=torch.float32, **rest):
    return attend, (torch.ones(3, 4, 16, dtype=dtype), *torch.ones(2, 3, keys, 16, dtype=dtype))
"""
GIVEN = "--input q=f32[3,4,16] --input k=f32[3,M,16] --input v=f32[3,M,16] --dynamic k.M=8:96"
MADE = f"mine.py:make --arg scale=0.75 {GIVEN}"


@dataclass(frozen=True)
class Row:
    """A line, and what it prints: patterns that are found on stdout and stderr ("": nothing is there) and in files."""

    line: str
    out: str = ""
    err: str = ""
    code: int = 0
    files: dict[str, str] = field(default_factory=dict)
    needs: str = ""


PROGRAM, BOUND = r"\Aprogram weigh", r"(?m)^rank M <= 96$(.|\n)* \* 0\.75"
ROWS = [
    Row("", r"\Ausage: memcomp COMMAND(.|\n)*exit codes:"),
    Row("--version", r"\Amemcomp \d+\.\d+\.\d+\n\Z"),
    Row("show weigh.mc", PROGRAM),
    Row("show weigh.mc --json --target h100", r'"digest": "\w+"'),
    Row("show weigh.mc -o out.mc", files={"out.mc": PROGRAM}),
    Row(f"show {MADE}", BOUND),
    Row("explain weigh.mc", r"\Aweigh\n(.|\n)*passes now(.|\n)*traffic: "),
    Row("explain weigh.mc --size M=48 --json", r'"M": 48'),
    Row("explain weigh.mc --target avx2 --target cpu --backend python -o out.txt",
        files={"out.txt": r"\A== avx2\n(.|\n)*== cpu"}),
    Row("explain weigh.mc --target avx2 --target cpu --backend python --json",
        r'"target": "avx2"(.|\n)*"target": "cpu"'),
    Row("explain weigh.mc --html page.html", files={"page.html": r"\A(?i:<!doctype html)"}),
    Row(f"explain {MADE}", r"kernel: region(.|\n)* at (.*, )?M=64(.|\n)* \* 0\.75"),
    Row("opt weigh.mc", r"\Aprogram weigh on cpu(.|\n)*iter"),
    Row("opt weigh.mc --target avx2 --json", r'"text": "program weigh on avx2'),
    Row("opt weigh.mc --dump-after canonicalize -o out.mc", err=r"\A# after canonicalize\nprogram",
        files={"out.mc": PROGRAM}),
    Row(f"opt {MADE}", BOUND),
    Row("cost weigh.mc", r"\Aweigh at M=1024, P=64\noperations "),
    Row("cost weigh.mc --size M=4096 --size P=2 --target h100", r"\Aweigh at M=4096, P=2\n"),
    Row("cost weigh.mc --traffic 1e6 --json -o out.json", files={"out.json": r'"traffic": 1000000\.0'}),
    Row(f"cost {MADE} --size M=88", r" M=88"),
    Row("emit weigh.mc --backend python", r"def weigh"),
    Row("emit weigh.mc --backend python --target cpu --target avx2 --json -o out.json",
        files={"out.json": r'"target": "cpu"(.|\n)*"target": "avx2"'}),
    Row("emit weigh.mc --cubin folder", err=r"\Aerror: --cubin writes code for GPUs, and cpu is none\nhint", code=2),
    Row(f"emit --backend python {MADE}", r"0\.75(.|\n)*def "),
    Row("check weigh.mc --backend python --size M=48", r"\AO: ok  max "),
    Row("check weigh.mc --backend python --size M=48 --json -o out.json", files={"out.json": r'"ok": true'}),
    Row(f"check --backend python {MADE}", r"\Aoutput 0: ok "),
    Row("check weigh.mc --interpret --target h100 --size M=20 --size P=4", r"\AO: ok ", needs="triton"),
    Row("bench --list", r"(?m)^decode "),
    Row("bench decode --rounds 3 --json -o out.json", r'"case": "decode', r"(?m)^decode ",
        files={"out.json": '"case"'}),
    Row("bench decode --target h100", err=r"\Aerror: target h100 is not this machine's CPU\nhint: ", code=2),
    Row("bench --device cuda --list decode", r"(?m)^decode"),
    Row("bench --device cuda decode --seconds 9 --interpret --tests tests --target a100 -o out.json",
        r"9\.0 s, rehearsed, tests in tests, for a100, into out\.json", code=1),
    Row("tune weigh.mc", r"\A1 of 1 programs measured", r"weigh: 1 ms \+- 10%"),
    Row("tune weigh.mc --mode full --seconds 7 --workers 3 --target avx2 --size M=9 --json",
        r'"how": "full, 7\.0 s, 3 workers, avx2 , M=9"'),
    Row("tune weigh.mc --backend python --again -o out.txt", err="weigh: ", files={"out.txt": r"\A1 of 1"}),
    Row(f"tune {MADE} --json", r"M=64"),
    Row("tune weigh.mc --ray local", r"\A1 of 1", r"on the cluster local"),
    Row("cache", r"\Ausage: memcomp cache COMMAND"),
    Row("cache ls", r"(?m)^\w{12}  1\.000e-03 s \+- 10%"),
    Row("cache ls --json", r'"median": 0\.001'),
    Row("cache show {key}", r'"knobs": \{\n'),
    Row("cache show {key} --json", r'"knobs": \{\n'),
    Row("cache export out.json", r"\A1 entries in out\.json", files={"out.json": r'"entries"'}),
    Row("cache export out.json --all --json", r'"written": 1'),
    Row("cache import two.json", r"\A1 new or changed, 1 known, 0 not taken"),
    Row("cache import two.json --json", r'"new": 1'),
    Row("cache merge two.json one.json -o out.json", r"\A2 entries of 3 in out\.json",
        files={"out.json": r'"entries"'}),
    Row("cache merge one.json --output out.json --json", r'"written": 1'),
    Row("cache diff one.json two.json", r"\Aonly in two\.json: ", code=1),
    Row("cache diff one.json one.json --json", r'"changed": \[\]'),
    Row("cache verify", r"\A1 files, 0 of them no entries"),
    Row("cache verify --json", r'"files": 1'),
    Row("cache gc", r"1 files deleted"),
    Row("cache gc --dry-run --json", r'"dry_run": true'),
    Row("cache stats", r"1 entries, \d+ bytes"),
    Row("cache stats --json", r'"entries": 1'),
    Row(f"compile {MADE} --size M=40 --strict -o art", r"\Awrote +art\n(.|\n)*M: 8 to 96\n(.|\n)* at M=40\n",
        files={"art/manifest.json": '"format"'}),
    Row(f"compile {MADE} --regions --target avx2 --target cpu --backend tvm --json -o art",
        r'"targets": \[\s*"avx2",\s*"cpu"\s*\]'),
    Row("run art", r"(?m)^output +\w+ f32\[3, 4, 16\]"),
    Row("run art --size M=20 --target cpu --repeat 3 --kernel region --json", r'"call_seconds": [\d.e-]+,'),
    Row("run art --input q=3,4,16 --input k=3,9,16 --input v=3,9,16 -o outs", r"called +in .* ms"),
    Row("run art --digest 00", err=r"\Aerror: art is another artifact", code=2),
    Row("models", r"(?m)^memcomp\.models\.mha:build +Multi-head attention"),
    Row("models --json", r'"name": "memcomp\.models\.mha:build"'),
    Row("targets", r"(?m)^h100 +triton"),
    Row("targets --json", r'"name": "h100"'),
    Row("kv", r"\Ausage: memcomp kv COMMAND"),
    Row("kv ls", r"(?m)^kivi +PART ENC UPD +3\.051 +bounded +in numpy +KIVI: "),
    Row("kv ls --size tokens=64 --json", r'"name": "kivi",\s+"composition": "PART ENC UPD",\s+"bits per value": "16"'),
    Row("kv show kivi", r"\Atitle +KIVI\nsource(.|\n)*\nbits +3\.051 per value\n"),
    Row("kv show 'kivi{bits=4}' --size head=64 --size layers=2 --json", r'"bits": 5\.0'),
    Row("kv show csr", r"runs +not yet: sparse: "),
    Row("kv show cq --size head=60", r"illegal codec: .*\n(.|\n)*runs +no: rule codec", code=1),
    Row("demo", r"\Athe demo\n"),
    Row("completion fish", r"complete -c memcomp "),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a program, a user's file and entries of a cache, one of them kept."""
    e = Entry({"program": "p"}, {"device": {"kind": "cpu", "cores": 2}, "code": "c0de", "versions": {}},
              Choice("", {"bp": 32}), Measured(1e-3, 0.1, 5, 0.5, 1.0))
    for name, text in (("weigh.mc", WEIGH), ("mine.py", MINE), ("one.json", exported([e])),
                       ("two.json", exported([e, replace(e, problem={"program": "q"})]))):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    Store(tmp_path / "cache").put(e)
    yield tmp_path
    sys.modules.pop("mine", None)


class StandIn:
    """Of a tuner: what it was asked is what it found."""

    def __init__(self, workers: int, ray: str = "") -> None:
        self.workers, self.ray = workers, ray

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def environment(self, config: Any) -> dict[str, Any]:
        return {"device": {"kind": "cpu", "cores": 2, "name": f"the cluster {self.ray}" if self.ray else ""},
                "code": "c0de", "versions": {}}

    def tune(self, program: Any, config: Any, sizes: Any, *, mode: str, seconds: float | None, **_: Any) -> Entry:
        from memcomp.pipeline import tunable

        said = f"{mode}, {seconds} s, {self.workers} workers, {config.target} {config.backend}, " + ", ".join(
            f"{k}={v}" for k, v in sorted(sizes.items()))
        if self.ray:
            print(f"on the cluster {self.ray}", file=sys.stderr)
        opened = tunable(program, config=config, sizes=sizes)
        return Entry(opened.problem, self.environment(config), opened.modelled,
                     Measured(1e-3, 0.1, 5, 0.5, 1.0, how=said))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take long is done by stand-ins that tell what they were asked."""
    from contextlib import contextmanager

    from memcomp.bench import OWN, Result
    from memcomp.bench.gpu import Plan
    from memcomp.bench.measure import Times

    def measure(case: Any, rounds: int, target: str) -> Result:
        return Result(case.name, {OWN: Times(1.0, 1.0, 0.1)}, {OWN: 0.0}, {}, 1.0, 1, {OWN: 1}, 1, {}, None)

    def run(plan: Plan, say: Any) -> Any:
        say(f"{plan.seconds} s, {'rehearsed' if plan.rehearse else 'real'}, tests in {plan.tuned or plan.tests}, for "
            f"{plan.target}, into {plan.output}")
        return argparse.Namespace(data={}, faults=["one"])

    @contextmanager
    def cluster(address: str, device: str, workers: int) -> Iterator[list[StandIn]]:
        yield [StandIn(workers, address)]

    monkeypatch.setattr("memcomp.bench.measure", measure)
    monkeypatch.setattr("memcomp.bench.gpu.run", run)
    monkeypatch.setattr("memcomp.tune.command.Tuner", StandIn)
    monkeypatch.setattr("memcomp.tune.cluster.tuners", cluster)
    monkeypatch.setattr("memcomp.demo.main", lambda: print("the demo"))


def outcome(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as ended:  # --help and --version
        return int(ended.code or 0)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A directory that `memcomp compile` wrote, made where it is asked for."""
    place = tmp_path_factory.mktemp("art") / "art"

    def made() -> Path:
        (place.parent / "mine.py").write_text(MINE)
        if not place.exists():
            line = MADE.replace("mine.py", f"{place.parent}/mine.py")
            assert main(["compile", *shlex.split(line), "-o", str(place)]) == 0
        return place

    return made


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.line or "alone")
def test_a_line_prints_what_it_says(row: Row, place: Path, art: Callable[[], Path],
                                    capsys: pytest.CaptureFixture[str]) -> None:
    if row.needs:
        pytest.importorskip(row.needs)
    if row.line.startswith("run "):
        shutil.copytree(art(), "art")
        capsys.readouterr()
    (entry,) = Store(place / "cache").entries()
    code = outcome(shlex.split(row.line.replace("{key}", entry.key[:9])))
    out, err = capsys.readouterr()
    assert code == row.code, err
    for text, wanted in ((out, row.out), (err, row.err), *(((place / f).read_text(), w) for f, w in row.files.items())):
        assert re.search(wanted, text) if wanted else not text, text[:1000]
    if "--json" in row.line and not row.files and not row.code:
        json.loads(out)
    assert not [p for p in place.iterdir() if p.name.startswith(".")], "nothing is left half written"


def commands(p: Parser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """Every command that does something, and its parser."""
    subs = [a for a in p._actions if isinstance(a.choices, dict)]
    yield path, p
    for action in subs:
        for name, sub in action.choices.items():
            yield from commands(sub, (*path, name))


def said(line: str, path: tuple[str, ...], p: Parser) -> set[str]:
    """Which arguments of a command a line names."""
    words = [w.partition("=")[0] if w.startswith("--") else w for w in shlex.split(line)]
    if tuple(words[:len(path)]) != path:
        return set()
    named = {a.dest for a in p._actions if set(a.option_strings) & set(words)}
    return named | {a.dest for a in p._actions if not a.option_strings and len(words) > len(path)}


def test_every_option_of_every_command_has_a_line() -> None:
    missing = []
    for path, p in commands(parser()):
        named = {dest for row in ROWS for dest in said(row.line, path, p)}
        missing += [f"{' '.join(path)} {a.option_strings or a.dest}" for a in p._actions
                    if a.dest not in (*named, "help") and not isinstance(a.choices, dict)]
        assert any(tuple(shlex.split(r.line)[:len(path)]) == path for r in ROWS), path
    assert not missing, "no tested line has: " + "; ".join(missing)


@pytest.mark.parametrize("path", [" ".join(path) for path, _ in commands(parser())])
def test_help_tells_of_every_option(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    p = dict(commands(parser()))[tuple(path.split())]
    assert outcome([*path.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: memcomp {path}".rstrip() in text
    for action in p._actions:
        assert action.help is None or action.help, action
        assert all(o in text for o in action.option_strings if not p.groups), action
        if not action.option_strings and not isinstance(action.choices, dict):
            assert str(action.metavar or action.dest) in text or action.choices, action
        assert action.help or isinstance(action.choices, dict), f"{path} {action.dest} has no help"
    if path and not p.groups:
        assert "examples:" in text, f"{path} has no example"
    for code in CODES if not path else ():
        assert re.search(rf"(?m)^  {code} ", text)


@pytest.mark.parametrize("line, wanted", [
    ("exlpain weigh.mc", "unknown command 'exlpain'\nhint: did you mean 'explain'?"),
    ("cache lst", "unknown command 'lst'\nhint: did you mean 'ls'?"),
    ("show weigh.mc --jsn", "unknown option '--jsn'\nhint: did you mean '--json'?"),
    ("show weigh.mc --js", "unknown option '--js'"),
    ("show", "required: INPUT\nhint: memcomp show --help"),
    ("show weigh.mc more.mc", "unknown argument 'more.mc'"),
    ("show --jsn", "unknown option '--jsn'"),
    ("show mine.py", "mine.py holds many things\nhint: say which: mine.py:name"),
    ("show ''", "no such file"),
    ("tune weigh.mc --mode fast", "unknown --mode 'fast'\nhint: known: full, quick"),
    ("tune weigh.mc --workers two", "invalid int value: 'two'"),
    ("kv show kiwi", "no system is called 'kiwi'\nhint: did you mean 'kivi'"),
    ("kv show my.kv", "no such file: my.kv"),
    ("kv ls --size depth=3", "a model has no extent 'depth'"),
    ("kv ls --size head=0", "is not head=N"),
    ("completion tcsh", "unknown shell 'tcsh'\nhint: "),
    ("emit weigh.mc --target cpu --target h101", "unknown target 'h101'"),
    ("explain weigh.mc --target cpu --target avx2 --html a.html", "one target"),
    ("show weigh.mc --input x=f32[3]", "program, which says itself"),
    ("show mine.py:attend --input q", "is not name=dtype[shape]\nhint: e.g."),
    ("show mine.py:attend --input q=f33[3]", "unknown dtype 'f33'\nhint: did you mean"),
    ("show mine.py:attend --input q=f32[-3]", "is not name=dtype[shape]"),
    ("show mine.py:attend --input q=f32[3,,2]", "'' is neither a number nor a name"),
    ("show mine.py:attend --input q=f32[3,4,16]", "no input is given for k"),
    ("show mine.py:attend --input x=f32[3] --input k=f32[3]", "has no input 'x'\nhint: known: k, q"),
    ("show mine.py:attend --input q=f32[3] --input q=f32[4]", "--input names q twice"),
    (f"show mine.py:attend {GIVEN} --dynamic v.M=8:100", "two ranges"),
    (f"show mine.py:attend {GIVEN} --dynamic v.N=8:100", "has no extent named N"),
    (f"show mine.py:attend {GIVEN} --dynamic q.7=8:100", "has no such dim"),
    (f"show mine.py:attend {GIVEN} --dynamic q.1=8:100", "the example has 4 there"),
    (f"show mine.py:attend {GIVEN} --dynamic q.1=100:8", "leaves nothing open"),
    (f"show mine.py:attend {GIVEN} --dynamic q=1:8", "is not name.dim=min:max"),
    (f"show mine.py:attend {GIVEN} --arg keys=3", "--arg is for what makes a function"),
    (f"cost mine.py:attend {GIVEN} --size M=97", "outside of its range 8:96"),
    (f"explain mine.py:attend {GIVEN} --size N=9", "no extent of the inputs is named N"),
    ("show mine.py:attend --input q=f32[3,4,E] --input k=f32[3,9,E] --input v=f32[3,9,E]", "fixes an extent"),
    ("show mine.py:attend --input q=f32[3,4,99999999999999999] --input k=f32[1] --input v=f32[1]", "cannot be made"),
    ("show mine.py:build --arg dtype=bf17", "unknown dtype"),
    ("show mine.py:build --arg keys", "is not name=value"),
    ("show mine.py:build --dynamic q.1=2:4 --dynamic x.1=2:4", "has no input 'x'"),
    ("show other.py:build", "no such file: other.py"),
    ("cost weigh.mc --size M=0", "leaves nothing to compute"),
    ("emit weigh.mc --target h100 --backend tvm", "has no kernels for h100\nit writes for CPUs\nhint: for h100: cuda"),
    ("explain weigh.mc --target h100 --target cpu --backend triton", "the backend triton has no kernels for cpu\n"),
    ("emit weigh.mc --target fusemax --backend tvm", "the backend tvm has no kernels for fusemax\n"),
    ("show mine.py:build@main", "is no Relax module, and has no functions to choose from\nhint: drop @main"),
    ("cost weigh.mc --size P=65", "P is at most 64"),
    ("check weigh.mc --size E=8", "not open\nhint: known: M, P"),
    ("check weigh.mc --size Q=8", "no rank is called 'Q'"),
    ("tune weigh.mc --size M=two", "is not RANK=N"),
])
def test_a_wrong_line_says_what_is_wrong(line: str, wanted: str, place: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and wanted in err and "Traceback" not in err, err
    assert err.count("\n") <= 3, "at most three lines"


def test_the_environment_names_the_target_and_an_option_wins(place: Path, capsys: pytest.CaptureFixture[str],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCOMP_TARGET", "avx2")
    monkeypatch.setenv("MEMCOMP_BACKEND", "python")
    assert main(["opt", "weigh.mc"]) == 0 and capsys.readouterr().out.startswith("program weigh on avx2\n")
    assert main(["opt", "weigh.mc", "--target", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("program weigh on cpu\n")
    assert main(["emit", "weigh.mc", "--json"]) == 0
    assert [(r["target"], r["backend"]) for r in json.loads(capsys.readouterr().out)] == [("avx2", "python")]
    monkeypatch.setenv("MEMCOMP_TARGET", "z80")
    assert main(["cost", "weigh.mc"]) == 2 and "'z80'" in capsys.readouterr().err
    assert main(["bench", "decode"]) == 2 and "'z80'" in capsys.readouterr().err


def test_what_is_exported_says_what_is_open(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    keys = torch.export.Dim("keys", min=2, max=512)
    made = torch.export.export(Attend(), (torch.randn(1, 2, 8, 16), torch.randn(1, 2, 24, 16)),
                               dynamic_shapes=({}, {2: keys}))
    torch.export.save(made, place / "a.pt2")
    assert main(["show", "a.pt2"]) == 0 and "rank M <= 512\n" in capsys.readouterr().out
    assert main(["show", "a.pt2", "--dynamic", "q.2=2:8"]) == 2 and "says itself" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_that_nobody_can_take_is_an_error_and_one_that_nobody_wants_is_none() -> None:
    call = [sys.executable, "-m", "memcomp", "targets"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the result cannot be written\n")
    gone, pipe = os.pipe()
    os.close(gone)
    done = subprocess.run(call, stdout=pipe, stderr=subprocess.PIPE, text=True)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line, where", [
    ("check weigh.mc --backend python -o out", "memcomp.oracle.check_program"),
    ("check weigh.mc --backend python -o out", "os.replace"),
    ("explain weigh.mc --backend python --html out", "memcomp.page.page"),
    ("emit weigh.mc --backend python --json -o out", "json.dumps"),
    (f"compile {MADE} -o out", "memcomp.artifact.pack.Pack._put"),
    (f"compile {MADE} -o out", "memcomp.artifact.pack.Path.rename")])
def test_ctrl_c_leaves_what_was_there(line: str, where: str, place: Path, art: Callable[[], Path],
                                      capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: what is written is there before, or after, never in part."""
    if line.startswith("compile"):
        shutil.copytree(art(), "out")
    else:
        (place / "out").write_text("old")
    capsys.readouterr()
    before = {p: p.read_bytes() if p.is_file() else b"" for p in place.rglob("*") if p.suffix != ".pyc"}
    module, _, name = where.rpartition(".")
    calls: list[Any] = []

    def interrupt(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) == (2 if name == "rename" else 1):
            raise KeyboardInterrupt
        return kept(*args, **named)

    owner = resolve_name(module)
    kept = getattr(owner, name)
    monkeypatch.setattr(owner, name, interrupt)
    assert main(shlex.split(line)) == 130
    out, err = capsys.readouterr()
    assert calls and not out and err == "interrupted; nothing was written in part\n"
    monkeypatch.undo()
    after = {p: p.read_bytes() if p.is_file() else b"" for p in place.rglob("*") if p.suffix != ".pyc"}
    assert {p: x for p, x in after.items() if "__pycache__" not in p.parts} == before


def test_an_error_that_is_memcomp_s_own_is_told_whole(place: Path, capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("never")

    monkeypatch.setattr("memcomp.cli.given.read", fail)
    assert main(["show", "weigh.mc"]) == 70
    err = capsys.readouterr().err
    assert "AssertionError: never" in err and err.splitlines()[-2] == "error: this is a fault of memcomp"


@pytest.mark.parametrize("name, code", [("tvm", 2), ("memcomp.nothing", 70)])
def test_what_is_not_installed_is_named(name: str, code: int, place: Path, capsys: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("memcomp.cli.given.read", fail)
    assert main(["show", "weigh.mc"]) == code
    assert ("error: this needs tvm, which is not installed\n" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_options_and_names(shell: str, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = tmp_path / "memcomp"
    script.write_text(capsys.readouterr().out)
    text = script.read_text()
    for word in ("explain", "--dump-after" if shell != "fish" else "-l dump-after", "h100", "gluon", "reduce_passes",
                 "memcomp.models.mha:build", "stats"):
        assert word in text, word
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here to read it")
    check = ["--no-execute"] if shell == "fish" else ["-n"]
    assert subprocess.run([shell, *check, str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "memcomp").write_text(capsys.readouterr().out + """
complete -p memcomp >&2
while read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [ "${line: -1}" = "?" ] && COMP_WORDS[-1]=""
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _shtab_memcomp
    echo "${COMPREPLY[*]}"
done
""")
    asked = {"memcomp expl": "explain", "memcomp cache st": "stats", "memcomp emit --targ": "--target",
             "memcomp emit --target h": "h100 h200", "memcomp opt x.mc --dump-after redu": "reduce_passes",
             "memcomp show memcomp.models.mh": "memcomp.models.mha:build", "memcomp completion ?": "bash zsh fish",
             "memcomp cache ?": "ls show export import merge diff verify gc stats"}
    done = subprocess.run(["bash", "--norc", "memcomp"], input="\n".join(asked) + "\n", cwd=tmp_path, text=True,
                          capture_output=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert dict(zip(asked, done.stdout.splitlines(), strict=True)) == asked


def test_help_is_there_at_once() -> None:
    """Nothing heavy is imported for it: what takes time is torch, TVM, numpy and their like."""
    code = ("import sys; from memcomp.cli.parser import parser; parser().format_help(); print(*sorted("
            "{m.partition('.')[0] for m in sys.modules} & {'torch', 'tvm', 'numpy', 'sympy', 'rich', 'shtab'}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
