"""`memcomp cache ...`: look at what was tuned, move it, check it, throw it away."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from memcomp.cache.entry import Entry
from memcomp.cache.environment import code
from memcomp.cache.store import Layers, Store
from memcomp.cache.transfer import difference, entries, exported, taken
from memcomp.cli.options import as_json
from memcomp.cli.parser import Commands
from memcomp.files import put
from memcomp.ir.errors import InputError, OptionError


def add(commands: Commands) -> None:
    """Add the parser of `cache` and its own commands to those of `memcomp`."""
    own = commands.family("cache", "Look at tuning results, move them between machines, check them, throw them away.")

    def command(name: str, do: Callable[[argparse.Namespace, Layers], int], text: str,
                example: str = "") -> argparse.ArgumentParser:
        p = own.add(name, lambda args: do(args, _layers()), text, (f"memcomp cache {name} {example}".rstrip(),))
        as_json(p)
        return p

    command("ls", _ls, "List the entries of all layers, one a line.")
    show = command("show", _show, "Print entries whole.", "1f2e3d")
    show.add_argument("key", metavar="KEY", help="beginning of an entry's key")
    out = command("export", _export, "Write all entries of the user's layer into one file.", "tuned.json")
    out.add_argument("file", metavar="FILE", type=Path, help="is written, whole or not at all")
    out.add_argument("--all", action="store_true", help="those of the system and of the package too")
    into = command("import", _import, "Join a file's entries to the user's layer.", "tuned.json")
    into.add_argument("file", metavar="FILE", type=Path, help="what `memcomp cache export` or `merge` wrote")
    merge = command("merge", _merge, "Merge files of entries into one; their order does not matter.",
                    "here.json there.json -o both.json")
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what `export` wrote")
    merge.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="is written")
    diff = command("diff", _diff, "Where two files of entries differ; exit code 1 where they do.",
                   "here.json there.json")
    diff.add_argument("left", metavar="FILE", type=Path, help="what `export` wrote")
    diff.add_argument("right", metavar="FILE", type=Path, help="another")
    command("verify", _verify, "Read every file of all layers; exit code 1 where one is no entry.")
    gc = command("gc", _gc, "Delete entries of other versions of memcomp, and files that are none.", "--dry-run")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    command("stats", _stats, "Entries and bytes by layer and device.")


def _layers() -> Layers:
    from memcomp.cache import layers
    from memcomp.config import config

    settings = config()
    return layers(settings.cache_dir, settings.cache)


def _told(args: argparse.Namespace, rows: Any, lines: Iterable[str]) -> None:
    text = json.dumps(rows, indent=2) if args.json else "\n".join(lines)
    if text:
        print(text)


def device(e: Entry) -> str:
    """A machine in a few words."""
    d = e.environment.get("device")
    if not isinstance(d, dict):
        return "unknown"
    return str(d.get("name") or f"{d.get('kind', 'unknown')}, {d.get('cores', '?')} cores")


def _line(e: Entry) -> str:
    extents = e.problem.get("extents")
    at = ", ".join(f"{k}={v}" for k, v in sorted(extents.items())) if isinstance(extents, dict) else ""
    return (f"{e.key[:12]}  {e.measured.median:.3e} s +- {e.measured.spread:.0%}  {device(e)}  "
            f"{e.problem.get('target', '?')}  at {at or 'fixed sizes'}: {e.choice}")


def _ls(args: argparse.Namespace, layers: Layers) -> int:
    found = [(s, e) for s in _stores(layers) for e in s.entries()]
    _told(args, [{"key": e.key, "place": e.place, "store": str(s.root), "median": e.measured.median} for s, e in found],
          [_line(e) for _, e in found] or ["no entries"])
    return 0


def _show(args: argparse.Namespace, layers: Layers) -> int:
    found = [e for s in _stores(layers) for e in s.entries() if e.key.startswith(args.key)]
    if not found:
        raise InputError(f"no entry's key begins with {args.key!r}", hint="`memcomp cache ls` lists them")
    print(json.dumps([json.loads(e.text()) for e in found], indent=2))
    return 0


def _export(args: argparse.Namespace, layers: Layers) -> int:
    stores = _stores(layers) if args.all else _stores(layers)[:1]
    found = [e for s in stores for e in s.entries()]
    put(args.file, exported(found))
    _told(args, {"written": len(found)}, [f"{len(found)} entries in {args.file}"])
    return 0


def _import(args: argparse.Namespace, layers: Layers) -> int:
    store = _writable(layers)
    try:
        made = taken(store, _text(args.file))
    except ValueError as error:
        raise InputError(f"{args.file} is no file of entries", str(error)) from None
    except OSError as error:
        raise InputError(f"the cache {store.root} cannot be written", str(error)) from None
    for why in made.bad:
        print(f"{args.file}: {why}", file=sys.stderr)
    _told(args, {"new": made.new, "known": made.known, "bad": list(made.bad)},
          [f"{made.new} new or changed, {made.known} known, {len(made.bad)} not taken"])
    return 1 if made.bad else 0


def _merge(args: argparse.Namespace, layers: Layers) -> int:
    found = [e for f in args.files for e in _entries(f)]
    text = exported(found)
    put(args.output, text)
    count = sum(1 for _ in entries(text))
    _told(args, {"read": len(found), "written": count}, [f"{count} entries of {len(found)} in {args.output}"])
    return 0


def _diff(args: argparse.Namespace, layers: Layers) -> int:
    d = difference(_entries(args.left), _entries(args.right))
    lines = [f"only in {file}: {_line(e)}" for file, side in ((args.left, d.left), (args.right, d.right)) for e in side]
    lines += [f"differ: {_line(a)}\n   and: {_line(b)}" for a, b in d.changed]
    _told(args, {"left": [e.key for e in d.left], "right": [e.key for e in d.right],
                 "changed": [a.key for a, _ in d.changed]}, lines or ["no difference"])
    return 1 if lines else 0


def _verify(args: argparse.Namespace, layers: Layers) -> int:
    found = [f for s in _stores(layers) for f in s.files()]
    bad = [f for f in found if f.entry is None]
    _told(args, {"files": len(found), "bad": [{"file": str(f.path), "why": f.why} for f in bad]},
          [*(f"{f.path}: {f.why}" for f in bad), f"{len(found)} files, {len(bad)} of them no entries"])
    return 1 if bad else 0


def _gc(args: argparse.Namespace, layers: Layers) -> int:
    store = _writable(layers)
    old = [f.path for f in store.files() if f.entry is None or f.entry.environment.get("code") != code()]
    gone = [*old, *store.unfinished()]
    kept = []
    for path in gone if not args.dry_run else ():
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a folder of an entry's name, or not ours
            print(f"{path}: not deleted: {error.strerror}", file=sys.stderr)
            kept.append(path)
    gone = [p for p in gone if p not in kept]
    what = "would be deleted" if args.dry_run else "deleted"
    _told(args, {"deleted": [str(p) for p in gone], "dry_run": args.dry_run},
          [*(str(p) for p in gone), f"{len(gone)} files {what}"])
    return 1 if kept else 0


def _stats(args: argparse.Namespace, layers: Layers) -> int:
    rows = []
    for s in layers.stores:
        found = list(s.files())
        good = [f.entry for f in found if f.entry is not None]
        rows.append({"store": str(s.root), "writable": s.writable, "entries": len(good), "bad": len(found) - len(good),
                     "bytes": sum(f.path.lstat().st_size for f in found), "devices": Counter(map(device, good))})
    _told(args, rows, [f"{r['store']}: {r['entries']} entries, {r['bytes']} bytes" + (
        f", {r['bad']} files are none" if r["bad"] else "") + ("" if r["writable"] else ", read only") + "".join(
        f"\n  {n}: {k}" for n, k in sorted(r["devices"].items())) for r in rows] or ["the cache is off"])  # type: ignore[attr-defined]
    return 0


def _stores(layers: Layers) -> tuple[Store, ...]:
    """All of them; what is off holds no entries that could be told from none (and written over others)."""
    if not layers.stores:
        raise OptionError("the cache is off", hint="unset MEMCOMP_CACHE, which says so")
    return layers.stores


def _writable(layers: Layers) -> Store:
    if layers.writable is None:
        raise OptionError("the cache is read only or off", hint="unset MEMCOMP_CACHE, which says so")
    return layers.writable


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", str(error)) from None


def _entries(path: Path) -> list[Entry]:
    bad: list[str] = []
    try:
        found = list(entries(_text(path), bad))
    except ValueError as error:
        raise InputError(f"{path} is no file of entries", str(error)) from None
    if bad:
        raise InputError(f"{path} holds what is no entry", bad[0])
    return found


