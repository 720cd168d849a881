"""`memcomp kv ls` and `memcomp kv show`: caches as compositions ([docs](kv.md))."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcomp.cli import options, out
from memcomp.cli.parser import Commands
from memcomp.ir.errors import InputError, OptionError, Refusal, nearest

if TYPE_CHECKING:
    from memcomp.passes.kv.account import Shape
    from memcomp.passes.kv.slots import KVSpec


def add(commands: Commands) -> None:
    own = commands.family("kv", "KV caches: how keys and values are stored, what it costs, what it promises.")
    ls = own.add("ls", listed, "List the named systems: composition, bits per value, class, source.",
                 ("memcomp kv ls", "memcomp kv ls --size head=64"))
    show = own.add("show", shown, "Print a cache written out: its bytes, what it promises, what cannot run yet.",
                   ("memcomp kv show kivi", "memcomp kv show 'kivi{bits=4}' --size tokens=4096",
                    "memcomp kv show my.kv"))
    show.add_argument("system", metavar="SYSTEM", help="a name of `memcomp kv ls`, with parameters if you like: "
                      "kivi{bits=4}; or a file that holds a specification")
    for p in (ls, show):
        p.add_argument("--size", metavar="NAME=N", action="append", default=[],
                       help="an extent of the model: layers, batch, heads, tokens, head (channels of one) or width (of "
                            "a layer's input)")
        options.as_json(p)


def listed(args: argparse.Namespace) -> int:
    from memcomp.passes.kv.systems import systems

    at = _shape(args.size)
    rows = []
    for row in systems().values():
        spec = row.spec()
        said = _facts(spec, at)
        rows.append((row.name, " ".join(said["slots"]) or "-", _bits(said), said["class"],
                     _runs(said), row.source))
    return out.table(args, ("name", "composition", "bits per value", "class", "runs", "source"), rows)


def shown(args: argparse.Namespace) -> int:
    from memcomp.passes.kv.systems import system
    from memcomp.passes.kv.text import parse

    at = _shape(args.size)
    path, row = Path(args.system), None
    if path.is_file():
        spec = parse(path.read_text(encoding="utf-8"))
    elif "/" in args.system or path.suffix == ".kv":
        raise InputError(f"no such file: {args.system}", hint="memcomp kv ls lists the systems that have a name")
    else:
        row = system(args.system.partition("{")[0].strip())
        spec = parse(args.system)
    about = {} if row is None else {n: getattr(row, n) for n in ("title", "source", "says", "needs") if getattr(row, n)}
    said = {**about, **_facts(spec, at)}
    found = int(bool(said["illegal"]))
    if args.json:
        defaults = dict(row.parameters) if row else {}
        print(out.dumped({"name": spec.name, "defaults": defaults, "text": str(spec), **said}))
        return found
    lines = [f"{name:8}{value}" for name, value in about.items()]
    lines += [*([""] if lines else []), str(spec).rstrip(), "", f"slots   {' '.join(said['slots']) or '-'}",
              f"class   {said['class']}", f"bits    {_bits(said)} per value", *_bytes(said),
              f"at      {', '.join(f'{n}={v}' for n, v in said['size'].items())}",
              *(f"illegal {x}" for x in said["illegal"]),
              "runs    " + _runs(said),
              *(f"table   {name}{shape}" for name, shape in said["tables"].items()), f"digest  {spec.digest}"]
    print("\n".join(lines))
    return found


def _runs(said: dict[str, Any]) -> str:
    if said["illegal"]:
        return f"no: rule {said['illegal'][0].partition(':')[0]}"
    return f"not yet: {'; '.join(said['lacks'])}" if said["lacks"] else "in numpy"


def _shape(sizes: list[str]) -> Shape:
    """The model that is spoken of.  Raises OptionError."""
    from memcomp.passes.kv.account import Shape

    found: dict[str, Any] = {}
    names = [f.name for f in fields(Shape) if f.name != "rope"]
    for text in sizes:
        name, _, value = text.partition("=")
        if name not in names:
            raise OptionError(f"a model has no extent {name!r}", hint=nearest(name, names))
        if not value.isdigit() or int(value) < (name != "width"):
            raise OptionError(f"--size {text} is not {name}=N", hint=f"{name}={getattr(Shape(), name)}")
        found[name] = int(value)
    return Shape(**found)


def _facts(spec: KVSpec, at: Shape) -> dict[str, Any]:
    """What is computed of a specification; bits and bytes are None where it is illegal or a codec is not built."""
    from memcomp.passes.kv.account import account, bits
    from memcomp.passes.kv.rules import broken
    from memcomp.passes.kv.status import correctness, lacks, needed, used

    illegal = [f"{rule.name}: {what} ({place})" for rule, place, what in broken(spec, at)]
    found: dict[str, Any] = {"slots": used(spec), "class": correctness(spec), "lacks": lacks(spec, at),
                             "illegal": illegal, "bits": None, "bytes": None, "tables": {}, "digest": spec.digest,
                             "size": {f.name: getattr(at, f.name) for f in fields(at) if f.name != "rope"}}
    if illegal:
        return found
    try:
        found["bytes"] = {}
        for r in (rows := account(spec, at)):
            name = " ".join(filter(None, (r.region, r.stream, r.plane)))
            found["bytes"][name] = found["bytes"].get(name, 0) + r.bytes
        found |= {"bits": float(bits(spec, at, rows)), "tables": needed(spec, at)}
    except Refusal:  # something is not built: `lacks` says what
        found["bytes"] = None
    return found


def _bits(said: dict[str, Any]) -> str:
    return "?" if said["bits"] is None else f"{said['bits']:.3f}".rstrip("0").rstrip(".")


def _bytes(said: dict[str, Any]) -> list[str]:
    if said["bytes"] is None:
        return []
    total = sum(said["bytes"].values())
    return [f"bytes   {total}", *(f"        {n:>14} {name}" for name, n in said["bytes"].items() if n)]
