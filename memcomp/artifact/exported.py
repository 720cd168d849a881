"""A model as torch.export sees it: its graph, what its inputs may be, and the tensors that it holds."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental import _config as oblivious
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from memcomp.artifact.plan import Size as Shown
from memcomp.capture import read_exported, table
from memcomp.capture.candidates import OWN_FRAME, source
from memcomp.capture.extent import expression, extent, size_name
from memcomp.capture.puts import written_over
from memcomp.capture.reader import DTYPE, meta
from memcomp.capture.rest import tidy
from memcomp.capture.writes import mutates
from memcomp.inputs import Function
from memcomp.ir.errors import InputError, Refusal
from memcomp.ir.expr import Expr, Size, substitute
from memcomp.ir.show import show_expr
from memcomp.ir.simplify import simplify
from memcomp.signature import parameters


@dataclass(frozen=True)
class Kept:
    """A tensor that a call leaves another: a buffer of the model, whose value `start` was, or an input (None).

    before, after: its value when the call begins, as a placeholder, and when it ends."""

    name: str
    before: fx.Node
    after: fx.Node
    start: torch.Tensor | None


@dataclass(frozen=True)
class Exported:
    """labels: names of the inputs; results: of the outputs; sizes: the run-time numbers of the graph, as the inputs'
    shapes show them; names: of its symbols; example: what they were when it was exported; kept: what it writes into."""

    gm: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    labels: tuple[str, ...]
    outputs: tuple[fx.Node, ...]
    results: tuple[str, ...]
    sizes: tuple[Shown, ...]
    names: Mapping[sympy.Symbol, str]
    example: Mapping[str, int]
    kept: tuple[Kept, ...] = ()

    def text(self, x: int | torch.SymInt) -> str:
        """An extent as an expression over `sizes`.  Raises Refusal where it depends on data."""
        e = extent(x)
        if isinstance(e, int):
            return str(e)
        if unknown := [s for s in e.free_symbols if s not in self.names]:
            raise Refusal(f"the extent {e} depends on data ({unknown[0]})")
        known: dict[Expr, Expr] = {Size(size_name(s)): Size(n) for s, n in self.names.items()}
        return show_expr(simplify(substitute(expression(e), known)))

    def shape(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(map(self.text, meta(node).shape))


def export(given: Function) -> Exported:
    """Export a function called with its inputs; what is no tensor is as it is in every call.

    Raises InputError where torch cannot export it, or its open extents cannot differ.
    """
    fn = given.fn
    if left := [p.name for p in parameters(fn) if p.kind == p.KEYWORD_ONLY and p.default is p.empty]:
        raise InputError(f"its inputs {', '.join(left)} are given by keyword only",
                         hint="memcomp.signature.by_position(model) takes them by position, after the others")
    at = [i for i, x in enumerate(given.inputs) if isinstance(x, torch.Tensor)]
    dims = [given.dims[i] if i < len(given.dims) else {} for i in at]
    module = fn if isinstance(fn, torch.nn.Module) and len(at) == len(given.inputs) else _Wrapped(fn, given.inputs, at)
    with _stateless(fn), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch's own code
        ep = _exported(module, tuple(given.inputs[i] for i in at), dims)
        if any(map(mutates, ep.graph.nodes)):  # the same operators, and what they wrote in place as values
            try:
                try:
                    ep = ep.run_decompositions({})
                except AssertionError:  # torch's, for a tensor that is a buffer and something else's attribute, too
                    ep = _exported(module, tuple(given.inputs[i] for i in at), dims, strict=True).run_decompositions({})
            except (MemoryError, RecursionError, InputError):
                raise
            except Exception as error:  # torch's own have no base
                raise InputError("torch.export cannot tell what it writes into", _why(error),
                                 "write into buffers (register_buffer) that share no memory") from error
    gm = read_exported(ep)
    if wrong := next((n for n in gm.graph.nodes if mutates(n) and not _keeps(n)), None):
        raise Refusal(f"{wrong.target} writes into a tensor", source(wrong), "compute a new one instead")
    tidy(gm)
    return _read(gm, _kept(gm), [given.names[i] for i in at], dims)


def _keeps(n: fx.Node) -> bool:
    """Is it what torch.export writes at a graph's end for each buffer and input that the model writes into?"""
    return n.target is torch.ops.aten.copy_.default and isinstance(n.args[0], fx.Node) and \
        n.args[0].op in ("get_attr", "placeholder")


def _kept(gm: fx.GraphModule) -> tuple[Kept, ...]:
    """Take these out of a graph; a buffer becomes a placeholder, since its value is not a constant."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for n in filter(_keeps, list(gm.graph.nodes)):
        to = n.all_input_nodes[0]
        after = written_over(gm, n, n.all_input_nodes[-1], meta(to))
        n.replace_all_uses_with(after)
        gm.graph.erase_node(n)
        found.append((to, after))
    now: dict[fx.Node, fx.Node] = {}
    for path in dict.fromkeys(str(to.target) for to, _ in found if to.op == "get_attr"):
        shown = [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) == path]
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            held = gm.graph.placeholder(re.sub(r"\W", "_", f"kept_{path}"))
        held.meta = dict(shown[0].meta)
        for n in shown:
            n.replace_all_uses_with(held)
            gm.graph.erase_node(n)
            now[n] = held
    return tuple(Kept(str(to.target), now.get(to, to), now.get(after, after),
                      table.attribute(gm, str(to.target)).detach() if to in now else None) for to, after in found)


def _exported(module: torch.nn.Module, inputs: tuple[Any, ...],
              dims: Sequence[Mapping[int, Any]], strict: bool = False) -> torch.export.ExportedProgram:
    """Where a dimension may be 1, as one that is treated like others, if the model allows it; else from 2 on, which is
    torch's own way: what is 1 broadcasts."""
    small = any(x.least < 2 for given in dims for x in given.values())
    for alike in (True, False) if small else (False,):
        try:
            with oblivious.patch(backed_size_oblivious=alike):  # type: ignore[attr-defined]
                shapes = _dynamic(module, inputs, dims)
                return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
        except (KeyboardInterrupt, MemoryError, RecursionError):
            raise
        except Exception as error:  # anything at all: it runs the user's code, and torch's own errors have no base
            if not alike:
                raise InputError("torch.export does not export it", _why(error),
                                 "torch.export.export(model, inputs, strict=False) must accept it") from error
    raise AssertionError


class _Wrapped(torch.nn.Module):
    """A function of the tensors alone that it is called with."""

    def __init__(self, fn: Any, inputs: Sequence[Any], at: Sequence[int]) -> None:
        super().__init__()
        self.fn, self.at = fn, tuple(at)
        self.others = [None if i in at else x for i, x in enumerate(inputs)]

    def forward(self, *args: torch.Tensor) -> Any:
        given = dict(zip(self.at, args, strict=True))
        return self.fn(*(given.get(i, x) for i, x in enumerate(self.others)))

    forward.__code__ = forward.__code__.replace(co_filename=OWN_FRAME)


def _why(error: Exception) -> str:
    """What torch's message says is wrong: its first sentence, and the first reason in the list after it."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [""]
    reason = next((x.removeprefix("- ") for x in lines[1:] if x.startswith("- ")), "")
    return f"{type(error).__name__}: {lines[0].partition(' For more information')[0]}" + f"\n{reason}" * bool(reason)


@contextmanager
def _stateless(module: Any) -> Iterator[None]:
    """Without the cache of keys and values that Hugging Face's models return beside the logits: it is a state."""
    settings = getattr(module, "config", None)
    before = getattr(settings, "use_cache", None)
    if settings is None or before is None:
        yield
        return
    settings.use_cache = False
    try:
        yield
    finally:
        settings.use_cache = before


def _dynamic(module: torch.nn.Module, inputs: Sequence[Any], dims: Sequence[Mapping[int, Any]]) -> Any:
    if not any(dims):
        return None
    made: dict[str, Any] = {}  # dimensions of one name are one size
    each = [{d: made.setdefault(x.name, torch.export.Dim(x.name, min=x.least, max=x.most)) for d, x in given.items()}
            for given in dims]
    parameters = inspect.signature(module.forward).bind(*inputs).arguments
    by_name: dict[str, Any] = {}
    rest = iter(each)
    for name, value in parameters.items():
        kind = inspect.signature(module.forward).parameters[name].kind
        by_name[name] = tuple(next(rest) for _ in value) if kind is inspect.Parameter.VAR_POSITIONAL else next(rest)
    return by_name


def _read(gm: fx.GraphModule, kept: tuple[Kept, ...], names: Sequence[str], dims: Sequence[Mapping[int, Any]]
          ) -> Exported:
    own = {k.before for k in kept if k.start is not None}
    inputs = tuple(n for n in gm.graph.nodes if n.op == "placeholder" and n not in own)
    labels = tuple(names[i] if names[i].isidentifier() else f"input{i}" for i in range(len(inputs)))
    named: dict[sympy.Symbol, Shown] = {}
    example: dict[str, int] = {}
    for i, n in enumerate(inputs):
        if meta(n).dtype not in DTYPE:
            raise Refusal(f"the input {n} is {meta(n).dtype}", hint=f"known: {', '.join(DTYPE.values())}")
        for d, x in enumerate(meta(n).shape):
            e = extent(x)
            symbols = [] if isinstance(e, int) else sorted(e.free_symbols, key=str)
            for s in symbols:
                if s not in named and (divisor := e / s).is_Integer:
                    given = dims[i].get(d)
                    name = _name(given.name if given else "N", {x.name for x in named.values()})
                    known = x.node.shape_env.bound_sympy(s)
                    most = int(known.upper) if known.upper.is_Integer and int(known.upper) < 2**40 else None
                    least = int(known.lower) if known.lower.is_Integer else 0
                    named[s] = Shown(name, labels[i], d, int(divisor), least, most)
                    example[name] = int(x.node.hint) // int(divisor)
    for n in gm.graph.nodes:
        shape = meta(n).shape if isinstance(meta(n), torch.Tensor) else ()
        if any(s not in named for x in shape if not isinstance(e := extent(x), int) for s in e.free_symbols):
            raise Refusal(f"the shape of what {n.target} makes depends on data", source(n),
                          "an artifact knows all shapes from those of its inputs")
    out = next(n for n in gm.graph.nodes if n.op == "output")
    found = [(n, x) for n, x in zip(_results(gm), tree_leaves(out.args[0]), strict=True) if x is not None]
    if wrong := [x for _, x in found if not isinstance(x, fx.Node) or not isinstance(meta(x), torch.Tensor)]:
        raise InputError("it returns what is no tensor", str(wrong[0]), "return tensors")
    if not found:
        raise InputError("it returns nothing", hint="return tensors")
    results = [n for n, _ in found]
    results = [n if results.count(n) == 1 and n.isidentifier() else f"out{k}" for k, n in enumerate(results)]
    out.args = ((*(x for _, x in found), *(k.after for k in kept)),)
    return Exported(gm, inputs, labels, tuple(x for _, x in found), tuple(results), tuple(named.values()),
                    {s: x.name for s, x in named.items()}, example, kept)


def _results(gm: fx.GraphModule) -> list[str]:
    """What the model calls each of its results, a number where it does not: `logits` of Hugging Face's models."""
    spec = gm._out_spec
    assert spec is not None, gm
    made = tree_unflatten(list(range(spec.num_leaves)), spec)
    return [re.sub(r"\W", "", str(path[-1])) if path else "out" for path, _ in tree_flatten_with_path(made)[0]]


def _name(wanted: str, taken: set[str]) -> str:
    word = "".join(c for c in wanted if c.isalnum() or c == "_").upper() or "N"
    word = word if word[0].isalpha() else f"N{word}"
    names = (word, *(f"{word}{k}" for k in range(2, 1000)))
    return next(n for n in names if n not in taken)
