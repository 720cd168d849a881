"""`memcomp run`: what `memcomp compile` wrote, loaded and called."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcomp.cli import options, out
from memcomp.cli.parser import Commands
from memcomp.ir.errors import InputError, OptionError, nearest

if TYPE_CHECKING:
    from memcomp.artifact.loading import Artifact

_SHAPE = re.compile(r"\d{1,18}(,\d{1,18})*,?")


def add(commands: Commands) -> None:
    p = commands.add("run", run, "Load such a directory, call it, and say what came out.", (
        "memcomp run layer", "memcomp run layer --input x=2,17,64 --repeat 100"))
    p.add_argument("directory", metavar="DIR", type=Path, help="what `memcomp compile` wrote")
    p.add_argument("--input", dest="inputs", metavar="NAME=FILE.npy|SHAPE", action="append", default=[],
                   help="an input: its numbers, or a shape for random ones, e.g. x=2,64; default: random")
    p.add_argument("--size", metavar="NAME=N", action="append", default=[], help="an open extent of the random inputs")
    p.add_argument("--kernel", metavar="NAME", help="of a directory of several kernels, which one")
    p.add_argument("--target", metavar="NAME",
                   help="one of the directory's targets; default: the best for this machine")
    p.add_argument("--digest", metavar="SHA256", help="refuse any directory but that of this digest")
    p.add_argument("--repeat", metavar="N", type=int, default=0,
                   help="call it N times more, and say how long a call takes")
    p.add_argument("-o", "--output", dest="folder", metavar="DIR", type=Path,
                   help="write every output there, as NAME.npy")
    options.as_json(p)


def run(args: argparse.Namespace) -> int:
    from statistics import median
    from time import perf_counter

    from memcomp.artifact.loading import load

    artifact = load(args.directory, target=args.target, digest=args.digest)
    kernel = artifact[args.kernel] if args.kernel else artifact
    inputs, sizes = _inputs(args, artifact, kernel)
    times = []
    for _ in range(1 + max(0, args.repeat)):
        artifact.reset()  # each call is the first
        start = perf_counter()
        outs = kernel(*inputs, **sizes)
        times.append(perf_counter() - start)
    told: dict[str, Any] = {
        "target": artifact.report.target.name, "digest": f"sha256:{artifact.report.digest}",
        "threads": artifact.report.threads, "load_seconds": artifact.report.seconds, "first_seconds": times[0],
        "call_seconds": median(times[1:]) if times[1:] else None,
        "outputs": [_told(t, x) for t, x in zip(kernel.outputs, outs, strict=True)]}
    if args.folder is not None:
        _save(args.folder, {t.name: x for t, x in zip(kernel.outputs, outs, strict=True)})
    if args.json:
        print(out.dumped(told))
        return 0
    print(artifact.report)
    for t in artifact.states:
        print(f"state    {t.name} {t.dtype}[{', '.join(t.shape)}]")
    for x in told["outputs"]:
        print(f"output   {x['name']} {x['dtype']}{x['shape']}" + (
            f", {x['least']:.6g} to {x['most']:.6g}, mean {x['mean']:.6g}" if x["least"] is not None else ""))
    print(f"called   in {times[0] * 1e3:.3g} ms" + (
        f"; {told['call_seconds'] * 1e6:.4g} us, the median of {args.repeat} more" if times[1:] else ""))
    return 0


def _inputs(args: argparse.Namespace, artifact: Artifact, kernel: Any) -> tuple[list[Any], dict[str, int]]:
    """The arrays to call with, and the sizes that no shape shows.  Raises OptionError for what does not fit."""
    import numpy as np

    from memcomp.artifact.manifest import expression
    from memcomp.ir.expr import Size, walk
    from memcomp.sizes import evaluate

    names = [t.name for t in kernel.inputs]
    given = dict(_pair("--input", x) for x in args.inputs)
    for name in given:
        if name not in names:
            raise OptionError(f"--input {name}: there is no such input", hint=nearest(name, names))
    sizes = _sizes(args, artifact, kernel)
    rng, out = np.random.default_rng(0), []
    for t in kernel.inputs:
        text = given.get(t.name, "")
        if text and not _SHAPE.fullmatch(text):
            out.append(_read(t.name, Path(text)))
            continue
        shape = tuple(int(n) for n in text.split(",") if n) if text else tuple(
            evaluate(expression(x), sizes) for x in t.shape)
        out.append(_random(rng, t.dtype, shape, _places(artifact, kernel, t.name, sizes)))
    shown = {x.rank for t in kernel.inputs for e in t.shape for x in walk(expression(e)) if isinstance(x, Size)}
    return out, {n: x for n, x in sizes.items() if n not in shown}


def _sizes(args: argparse.Namespace, artifact: Artifact, kernel: Any) -> dict[str, int]:
    """Extents for what the shapes leave open: asked for, those of the example, or some that are allowed."""
    plan = artifact.plan
    plan = plan if kernel is artifact else None
    ranges: dict[str, Any] = {r.name: r for r in (_spec(artifact, kernel).sizes if plan is None else plan.sizes)}
    asked = dict(_pair("--size", x) for x in args.size)
    found = {}
    for name, text in asked.items():
        if name not in ranges:
            raise OptionError(f"--size {name}: there is no such size", hint=nearest(name, ranges))
        if not text.isdigit():
            raise OptionError(f"--size {name}={text} is no number", hint=f"e.g. --size {name}=64")
        found[name] = int(text)
    usual = plan.example if plan is not None else {}
    for name, r in ranges.items():
        least = max(r.least, 64)
        found.setdefault(name, usual.get(name, least if r.most is None else min(least, r.most)))
    return found


def _spec(artifact: Artifact, kernel: Any) -> Any:
    return next(iter(artifact.kernels.values())).spec if kernel is artifact else kernel.spec


def _places(artifact: Artifact, kernel: Any, name: str, sizes: Mapping[str, int]) -> int | None:
    """How many elements an index names, where an input is one."""
    from memcomp.artifact.manifest import expression
    from memcomp.sizes import evaluate

    if artifact.plan is not None and kernel is artifact:
        texts = [s.sizes["size"] for s in artifact.plan.steps if s.kind == "check" and s.reads == (name,)]
    else:
        spec = _spec(artifact, kernel)
        texts = [x.size for x in spec.lookups if spec.inputs[x.input].name == name]
    return min((evaluate(expression(x), sizes) for x in texts), default=None)


def _random(rng: Any, dtype: str, shape: Sequence[int], places: int | None) -> Any:
    import numpy as np

    from memcomp.artifact.memory import NUMPY, empty

    if dtype == "bf16":
        made = empty(dtype, shape)
        made.data[...] = (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return made
    if dtype not in NUMPY:
        made = empty(dtype, shape)
        made.data[...] = rng.integers(0x20, 0x40, shape)  # bits of numbers of the size of 1
        return made
    kind = np.dtype(NUMPY[dtype])
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    return rng.integers(0, 2 if places is None else places, shape).astype(kind)


def _read(name: str, place: Path) -> Any:
    import numpy as np

    try:
        return np.load(place, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--input {name}: cannot read {place}", str(error).splitlines()[0],
                         "give a .npy file, or a shape such as 2,64") from error


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise OptionError(f"{option} {text!r} is not name=value")
    return name, value


def _numbers(x: Any) -> Any:
    return x.numpy() if hasattr(x, "numpy") else x


def _told(t: Any, x: Any) -> dict[str, Any]:
    import numpy as np

    a = _numbers(x).astype(np.float64)
    least, mean, most = (float(f(a)) for f in (np.min, np.mean, np.max)) if a.size else (None, None, None)
    return {"name": t.name, "dtype": t.dtype, "shape": list(a.shape), "least": least, "mean": mean, "most": most}


def _save(folder: Path, outs: Mapping[str, Any]) -> None:
    from io import BytesIO

    import numpy as np

    from memcomp.files import put

    folder.mkdir(parents=True, exist_ok=True)
    for name, x in outs.items():
        data = BytesIO()
        np.save(data, _numbers(x), allow_pickle=False)
        put(folder / f"{name}.npy", data.getvalue())
