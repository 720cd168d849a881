"""`memcomp bench`: kernels beside their rivals, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memcomp.cli import options
from memcomp.cli.parser import Commands
from memcomp.files import put
from memcomp.ir.errors import OptionError

if TYPE_CHECKING:
    from memcomp.bench import Result


def add(commands: Commands) -> None:
    p = commands.add("bench", run, "Time kernels beside torch's, FlexAttention's and Inductor's on this machine.", (
        "memcomp bench --list", "memcomp bench decode --rounds 9 -o decode.json", "memcomp bench --device cuda"))
    options.as_json(p)
    options.target(p)
    p.add_argument("only", nargs="*", metavar="WORD", help="cases whose name holds one of the words; default: all")
    p.add_argument("--list", action="store_true", help="list the cases and run none")
    p.add_argument("--rounds", type=int, default=31, help="turns of a case, at most (default 31)")
    p.add_argument("-o", "--output", type=Path, help="write the results here as JSON, after each case")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                   help="cuda: check every backend and case, then time, on this machine's GPU")
    p.add_argument("--seconds", type=float, default=430.0, help="cuda: for everything (default 430)")
    p.add_argument("--interpret", action="store_true",
                   help="cuda: rehearse with small cases and Triton's interpreter, without a GPU")
    p.add_argument("--tests", type=Path, metavar="FOLDER",
                   help="cuda: also check FOLDER/cases/*.mc and run FOLDER/test_gpu.py")


def run(args: argparse.Namespace) -> int:
    return _cuda(args) if args.device == "cuda" else _cpu(args)


def _cpu(args: argparse.Namespace) -> int:
    from memcomp.backends import device_of
    from memcomp.config import config

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself on stderr
    settings = config(options.machine(args))
    if device_of(settings) != "cpu":
        raise OptionError(f"target {settings.target} is not this machine's CPU",
                          hint="cpu, or avx2 for older instructions")
    if args.rounds < 2:
        raise OptionError(f"--rounds {args.rounds} gives no spread", hint="at least 2")
    from memcomp.bench import named, run, written

    if args.list:
        names = [c.name for c in named(args.only)]
        print(json.dumps(names, indent=2) if args.json else "\n".join(names))
        return 0
    found: list[Result] = []

    def done(result: Result) -> None:
        found.append(result)
        print("\n".join(result.lines()), file=sys.stderr if args.json else sys.stdout, flush=True)
        if args.output is not None:
            put(args.output, written(found))

    run(args.only, args.rounds, done, settings.target)
    if args.json:
        print(written(found))
    return 0


def _cuda(args: argparse.Namespace) -> int:
    from memcomp.bench.gpu import Plan, chosen, run
    from memcomp.config import config

    machine = config(options.machine(args)).target
    cases = chosen(args.only, args.interpret, args.tests)
    if args.list:
        print(json.dumps([c.name for c in cases], indent=2) if args.json else "\n".join(c.name for c in cases))
        return 0
    plan = Plan(cases, args.seconds, args.interpret, args.tests, args.output,
                target="" if machine == "cpu" else machine, words=tuple(args.only))
    found = run(plan, lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True))
    if args.json:
        print(json.dumps(found.data, indent=2))
    return 1 if found.faults else 0
