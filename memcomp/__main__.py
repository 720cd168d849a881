"""The command line: `memcomp --help` lists the commands.

Results go to stdout (or, whole or not at all, to --output), all else to stderr.  Errors: three lines, exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcomp.cache import commands as cache
from memcomp.cache import layers
from memcomp.files import check_place, put
from memcomp.inputs import FORMS, read, used
from memcomp.ir.errors import InputError, MemcompError, OptionError, nearest
from memcomp.ir.program import Program

if TYPE_CHECKING:
    from memcomp.ir.target import Target
    from memcomp.ir.tile import Kernel


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (`check` found an error), 2 (bad input), 130 (Ctrl-C)."""
    args = _parser().parse_args(argv)
    try:
        for place in filter(None, (getattr(args, "output", None), getattr(args, "html", None))):
            check_place(place)
        return int(args.run(args))
    except MemcompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RecursionError, MemoryError) as error:  # a legal program may be larger than what runs it
        print(f"error: {args.input} is too large for this machine\n{type(error).__name__}: {error}\n"
              "hint: use smaller extents, and fewer operations in one statement", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written in part", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memcomp", description="A compiler for attention and memory layers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, *, takes_input: bool = True,
                machine: bool = True, target: bool = True, backend: bool = False) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        if takes_input:
            p.add_argument("input", help=FORMS)
            p.add_argument("-o", "--output", type=Path, help="write here instead of stdout")
        if machine:
            p.add_argument("--json", action="store_true", help="print JSON")
        if target:
            p.add_argument("--target", default="cpu", help="a name of `memcomp targets`")
        if backend:
            p.add_argument("--backend", default="", help="who writes the kernels; default: the target's own")
        return p

    command("show", _show, "Print the programs that are read out of the input.")
    explain = command("explain", _explain, "Passes, kernels and traffic of each region, before and after.",
                      backend=True)
    explain.add_argument("--html", metavar="FILE", type=Path,
                         help="write one page that shows it all, instead (as does -o FILE.html)")
    opt = command("opt", _opt, "Print the rewritten programs.")
    opt.add_argument("--dump-after", metavar="STATION", action="append", default=[],
                     help="also print after this station (repeatable; `all`)")
    cost = command("cost", _cost, "Operations, traffic and time by the cost model.")
    cost.add_argument("--size", metavar="RANK=N", action="append", default=[], help="extent of a symbolic rank")
    cost.add_argument("--traffic", metavar="BYTES",
                      help="bytes to and from memory, where they are known, instead of the model's")
    emit = command("emit", _emit, "Print the kernels' source.", backend=True)
    emit.add_argument("--cubin", metavar="FOLDER", type=Path,
                      help="also write machine code for the target's GPU there, to be launched without a compiler")
    check = command("check", _check, "Run compiled, eager and in float64, and compare; exit code 1 if wrong.",
                    backend=True)
    check.add_argument("--interpret", action="store_true",
                       help="kernels for a GPU by their language's interpreter, on this machine: slow")
    bench = command("bench", _bench, "Time kernels beside torch's, FlexAttention's and Inductor's on this machine.",
                    takes_input=False)
    bench.add_argument("only", nargs="*", metavar="WORD", help="cases whose name holds one of the words; default: all")
    bench.add_argument("--list", action="store_true", help="list the cases and run none")
    bench.add_argument("--rounds", type=int, default=31, help="turns of a case, at most (default 31)")
    bench.add_argument("-o", "--output", type=Path, help="write the results here as JSON, after each case")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                       help="cuda: check every backend and case, then time, on this machine's GPU")
    bench.add_argument("--seconds", type=float, default=430.0, help="cuda: for everything (default 430)")
    bench.add_argument("--interpret", action="store_true",
                       help="cuda: rehearse with small cases and Triton's interpreter, without a GPU")
    bench.add_argument("--tests", type=Path, metavar="FOLDER",
                       help="cuda: also check FOLDER/cases/*.mc and run FOLDER/test_gpu.py")
    tune = command("tune", _tune, "Measure which way to map each program is fastest, and keep it in the cache.",
                   backend=True)
    tune.add_argument("--mode", choices=("quick", "full"), default="quick", help="20 s a program, or ten minutes")
    tune.add_argument("--seconds", type=float, help="for each program, instead of the mode's")
    tune.add_argument("--workers", type=int, default=0, help="processes that try candidates; default: one a core")
    tune.add_argument("--again", action="store_true", help="also what the cache knows")
    cache.add(commands, _cache)
    command("models", _models, "List the workloads that come with memcomp.", takes_input=False, target=False)
    command("targets", _targets, "List the machines that can be compiled for.", takes_input=False, target=False)
    command("demo", _demo, "A real language model, compiled, run and explained.", takes_input=False, machine=False,
            target=False)
    return parser


def _show(args: argparse.Namespace) -> int:
    return _programs(args, _read_programs(args))


def _machine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of a compilation that the command line names; what it does not name the environment may."""
    return {"target": args.target} | ({"backend": args.backend} if args.backend else {})


def _opt(args: argparse.Namespace) -> int:
    from memcomp.config import config
    from memcomp.pipeline import compile_program
    from memcomp.stations import STATIONS, text_of

    wanted = set(args.dump_after)
    if unknown := wanted - {*STATIONS, "all"}:
        raise OptionError(f"unknown station {min(unknown)!r}", hint=nearest(min(unknown), STATIONS))

    def observe(station: str, value: object) -> None:
        if wanted & {station, "all"}:
            print(f"# after {station}\n{text_of(value)}", file=sys.stderr)

    settings = config({"target": args.target})
    programs = [compile_program(p, config=settings, observe=observe).program for p in _read_programs(args)]
    return _programs(args, programs)


def _programs(args: argparse.Namespace, programs: Sequence[Program]) -> int:
    if args.json:
        rows = [{"name": p.name, "digest": p.digest, "text": str(p)} for p in programs]
        return _write(args, json.dumps(rows, indent=2))
    return _write(args, "\n".join(str(p).rstrip() + "\n" for p in programs).rstrip())


def _explain(args: argparse.Namespace) -> int:
    from memcomp.report import explain

    html = args.html or (args.output if args.output and args.output.suffix in (".html", ".htm") else None)
    if html and args.json:
        raise OptionError("the explanation cannot be JSON and a page of HTML at once", hint="run it twice")
    if args.html and args.output:
        raise OptionError("--html and -o both name the file to write", hint="use one of them")
    given = read(args.input)
    with used(given):
        found = (explain(given, **_machine_options(args)) if isinstance(given, Program)
                 else explain(given.fn, *given.inputs, **_machine_options(args)))
    if html:
        put(html, found.html())
        return 0
    return _write(args, json.dumps(found.json(), indent=2) if args.json else str(found))


def _cost(args: argparse.Namespace) -> int:
    from memcomp.config import config
    from memcomp.ir.cost import cost
    from memcomp.ir.target import target
    from memcomp.pipeline import map_program
    from memcomp.sizes import shape_sizes

    settings = config({"target": args.target})
    known = dict(_assignment(s) for s in args.size)
    moved = None if args.traffic is None else _count(args.traffic)
    rows = []
    for p in _read_programs(args):
        if unknown := known.keys() - {r.name for r in p.cascade.ranks}:
            raise OptionError(f"{p.name} has no rank {min(unknown)!r}",
                              hint=nearest(min(unknown), [r.name for r in p.cascade.ranks]))
        program = map_program(p, config=settings, sizes=known)
        sizes = shape_sizes(p, program, known)
        rows.append((program, sizes, cost(program, sizes, target(args.target), moved)))
    if args.json:
        from dataclasses import asdict

        return _write(args, json.dumps([{"name": p.name, "sizes": s, **asdict(c)} for p, s, c in rows], indent=2))
    return _write(args, "\n\n".join(
        f"{p.name} at {', '.join(f'{n}={x}' for n, x in sorted(s.items())) or 'fixed sizes'}\n{c}" for p, s, c in rows))


def _emit(args: argparse.Namespace) -> int:
    from memcomp.backends import device_of
    from memcomp.config import config
    from memcomp.pipeline import compile_program

    settings = config(_machine_options(args))
    if args.cubin is not None and device_of(settings) != "cuda":
        raise OptionError(f"--cubin writes code for GPUs, and {args.target} is none", hint="e.g. --target h100")
    kernels = [compile_program(p, config=settings).kernel for p in _read_programs(args)]
    distinct = {k.source: k for k in kernels}.values()
    if args.cubin is not None:
        _save(args.cubin, distinct)
    if args.json:
        return _write(args, json.dumps([{"name": k.name, "backend": k.backend, "entry": k.entry, "source": k.source}
                                        for k in distinct], indent=2))
    return _write(args, "\n".join(k.source.rstrip() + "\n" for k in distinct).rstrip())


def _save(folder: Path, kernels: Iterable[Kernel]) -> None:
    """A file for each kernel, of its name; numbered where several have the same."""
    from memcomp.artifact.files import ENDING, save, saved

    names: list[str] = []
    for k in kernels:
        names.append(k.name)
        number = f"_{names.count(k.name)}" if names.count(k.name) > 1 else ""
        place = folder / f"{k.name}{number}{ENDING}"
        save(saved(k), place)
        print(f"wrote {place}", file=sys.stderr)


def _check(args: argparse.Namespace) -> int:
    from memcomp.oracle import check, check_program

    given = read(args.input)
    with used(given):
        options = _machine_options(args) | ({"interpret": True} if args.interpret else {})
        report = (check_program(given, **options) if isinstance(given, Program)
                  else check(given.fn, *given.inputs, **options))
    if args.json:
        rows = [{"name": r.name, "ok": r.ok, "max_error": r.error.max, "tolerance": r.tolerance.max}
                for r in report.rows]
        _write(args, json.dumps({"ok": report.ok, "outputs": rows}, indent=2))
    else:
        _write(args, str(report))
    return 0 if report.ok else 1


def _bench(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        return _bench_cuda(args)
    from memcomp.backends import device_of
    from memcomp.config import Config

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself on stderr
    if device_of(Config(args.target)) != "cpu":
        raise OptionError(f"target {args.target} is not this machine's CPU", hint="cpu, or avx2 for older instructions")
    if args.rounds < 2:
        raise OptionError(f"--rounds {args.rounds} gives no spread", hint="at least 2")
    from memcomp.bench import Result, named, run, written

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

    run(args.only, args.rounds, done, args.target)
    if args.json:
        print(written(found))
    return 0


def _bench_cuda(args: argparse.Namespace) -> int:
    from memcomp.bench.gpu import Plan, chosen, run

    cases = chosen(args.only, args.interpret)
    if args.list:
        print(json.dumps([c.name for c in cases], indent=2) if args.json else "\n".join(c.name for c in cases))
        return 0
    plan = Plan(cases, args.seconds, args.interpret, args.tests, args.output,
                target="" if args.target == "cpu" else args.target)
    found = run(plan, lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True))
    if args.json:
        print(json.dumps(found.data, indent=2))
    return 1 if found.faults else 0


def _tune(args: argparse.Namespace) -> int:
    from memcomp.config import config
    from memcomp.tune.command import told, tune

    settings = config({**_machine_options(args), "tune": args.mode})
    rows = tune(_read_regions(args), settings, seconds=args.seconds, workers=args.workers, again=args.again)
    return _write(args, told(rows, args.json))


def _cache(args: argparse.Namespace) -> int:
    from memcomp.config import config

    settings = config()
    return int(args.do(args, layers(settings.cache_dir, settings.cache)))


def _models(args: argparse.Namespace) -> int:
    from memcomp.inputs import workloads

    return _table(args, ("name", "what it is"), workloads())


def _targets(args: argparse.Namespace) -> int:
    from memcomp.ir.target import target, targets

    return _table(args, ("name", "backend", "threads", "peak f32", "memory", "figures from"),
                  [_machine(target(n)) for n in targets()])


def _machine(t: Target) -> tuple[str, ...]:
    memory = f"{t.memory.bytes / 2**30:.0f} GiB, " if t.memory.bytes else ""
    return (t.name, t.backend, str(t.threads), f"{t.peak('f32') / 1e9:.0f} GFLOP/s",
            f"{memory}{t.memory.bandwidth / 1e9:.0f} GB/s", t.source)


def _demo(args: argparse.Namespace) -> int:
    from memcomp.demo import main as demo

    return int(demo() or 0)


def _read_programs(args: argparse.Namespace) -> list[Program]:
    """The program given, or those of the regions of the function given, each distinct one once."""
    return [p for p, _ in _read_regions(args)]


def _read_regions(args: argparse.Namespace) -> list[tuple[Program, Mapping[str, int]]]:
    """As `_read_programs`, with the extents of symbolic ranks as far as they are known."""
    given = read(args.input)
    if isinstance(given, Program):
        return [(given, {})]
    from memcomp.config import config
    from memcomp.report import explain

    config({"target": args.target})
    with used(given):  # what is read is the same for every machine, and not every one can be compiled for here
        found = explain(given.fn, *given.inputs, target="cpu")
    for r in found.refusals:
        print(f"left to torch: {r.where}: {r.why}", file=sys.stderr)
    if not found.regions:
        raise InputError(f"nothing in {args.input} is an attention or memory layer that memcomp can express",
                         hint="`memcomp explain` says what was left to torch and why")
    return list({r.read.digest: (r.read, r.known) for r in found.regions}.values())


def _count(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise OptionError(f"--traffic {text!r} is not a number of bytes", hint="e.g. 1.5e9")
    return value


def _assignment(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not (value.isascii() and value.isdigit() and len(value) < 19):
        raise OptionError(f"--size {text!r} is not RANK=N", hint="e.g. --size M=4096")
    return name, int(value)


def _table(args: argparse.Namespace, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> int:
    if args.json:
        print(json.dumps([dict(zip(columns, r, strict=True)) for r in rows], indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for r in rows:
        table.add_row(*r)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _write(args: argparse.Namespace, text: str) -> int:
    """To stdout, or to the file as a whole: a reader never sees half of it."""
    if args.output is None:
        print(text)
        return 0
    put(args.output, text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
