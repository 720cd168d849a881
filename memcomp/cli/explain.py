"""`memcomp explain`: passes, kernels and traffic, as a table, JSON or a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands
from memcomp.files import put
from memcomp.inputs import used
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program


def add(commands: Commands) -> None:
    p = commands.add("explain", run, "Passes, kernels and traffic of each region, before and after.", (
        "memcomp explain memcomp.models.mha:build", "memcomp explain model.pt2 --html model.html",
        "memcomp explain program.mc --size M=4096 --target cpu --target h100"))
    options.given(p, sizes="extent of an open rank or input; default: a program's bound, or 1024")
    options.output(p)
    options.as_json(p)
    options.target(p, several=True)
    options.backend(p)
    p.add_argument("--html", metavar="FILE", type=Path,
                   help="write one page that shows it all, instead (as does -o FILE.html)")


def run(args: argparse.Namespace) -> int:
    from memcomp.report import explain

    html = args.html or (args.output if args.output and args.output.suffix in (".html", ".htm") else None)
    if html and args.json:
        raise OptionError("the explanation cannot be JSON and a page of HTML at once", hint="run it twice")
    if args.html and args.output:
        raise OptionError("--html and -o both name the file to write", hint="use one of them")
    machines = options.machines(args)
    if html and len(machines) > 1:
        raise OptionError("a page of HTML is for one target", hint="run it once for each --target")
    found = given.whole(args)
    with used(found):
        explained = [explain(found, sizes=given.sizes(args, found), **one) if isinstance(found, Program)
                     else explain(found.fn, *found.marked(), **one) for one in machines]
    if html:
        put(html, explained[0].html())
        return 0
    if len(machines) == 1:
        return out.write(args, out.dumped(explained[0].json()) if args.json else str(explained[0]).rstrip())
    each = list(zip((one["target"] for one in machines), explained, strict=True))
    if args.json:
        return out.write(args, out.dumped([{"target": name, **e.json()} for name, e in each]))
    return out.write(args, "\n\n".join(f"== {name}\n{str(e).rstrip()}" for name, e in each))
