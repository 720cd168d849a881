"""`memcomp check`: compiled, eager and in float64, compared."""

from __future__ import annotations

import argparse

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands
from memcomp.inputs import used
from memcomp.ir.program import Program


def add(commands: Commands) -> None:
    p = commands.add("check", run, "Run compiled, eager and in float64, and compare; exit code 1 if wrong.", (
        "memcomp check memcomp.models.mha:build", "memcomp check program.mc --size M=1000",
        "memcomp check program.mc --target h100 --interpret"))
    options.given(p, sizes="extent of an open rank or input; default: a program's bound, or 1024")
    options.output(p)
    options.as_json(p)
    options.target(p)
    options.backend(p)
    p.add_argument("--interpret", action="store_true",
                   help="kernels for a GPU by their language's interpreter, on this machine: slow")


def run(args: argparse.Namespace) -> int:
    from memcomp.oracle import check, check_program

    found = given.whole(args)
    with used(found):
        settings = options.machine(args) | ({"interpret": True} if args.interpret else {})
        report = (check_program(found, sizes=given.sizes(args, found), **settings) if isinstance(found, Program)
                  else check(found.fn, *found.marked(), **settings))
    if args.json:
        rows = [{"name": r.name, "ok": r.ok, "max_error": r.error.max, "tolerance": r.tolerance.max}
                for r in report.rows]
        out.write(args, out.dumped({"ok": report.ok, "outputs": rows}))
    else:
        out.write(args, str(report))
    return 0 if report.ok else 1
