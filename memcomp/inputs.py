"""What a user may name on the command line: `module:factory`, a .pt2 file, a Hugging Face config, a .mc file, `-`.

Also `module:function` or `module:Module`, where `--input` says what it is called with (`memcomp.signature`).
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from memcomp.ir.errors import InputError, MemcompError, OptionError, nearest
from memcomp.ir.program import Program
from memcomp.signature import NOTHING, Asked, Dim, by_position, filled, marked, parameters, positional

FORMS = ("module:factory or file.py:factory, with --input also :function, :name@function of a Relax module, model.pt2, "
         "config.json or its directory, program.mc, or - for a .mc program on stdin")

LOGGERS = ("torch._guards", "torch._subclasses.fake_tensor")  # tell at length of what is raised as well


@dataclass(frozen=True, slots=True)
class Function:
    """A callable and the inputs to call it with.  dims: of each input, the extents that are left open, by dim."""

    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    dims: tuple[Mapping[int, Dim], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What its parameters call the inputs."""
        return positional(self.fn, len(self.inputs))

    def marked(self) -> tuple[Any, ...]:
        """The inputs, as torch's compiler is told which extents are open."""
        return marked(self.inputs, self.dims)


def read(spec: str, ask: Asked = NOTHING) -> Program | Function:
    """The program or function that `spec` names, with the inputs that are asked for.

    `module:factory` imports and runs code, and a .pt2 file holds pickled inputs: both must be trusted.
    A Hugging Face config gets random weights; a directory with weights is loaded from disk only.
    Raises InputError (or ParseError for a malformed .mc), OptionError where `ask` does not fit it.
    """
    found = _read(spec, ask)
    if isinstance(found, Program):
        if ask.inputs or ask.dynamic or ask.arguments:
            raise OptionError(f"{spec} is a program, which says itself what its inputs are",
                              hint="--size RANK=N gives an open rank an extent")
        return found
    return found


def _read(spec: str, ask: Asked) -> Program | Function:
    path = Path(spec)
    try:
        if spec == "-":
            return _program(sys.stdin.read().removeprefix("\ufeff"))
        if not spec or not path.exists():
            if ":" in spec:
                return _factory(spec, ask)
            raise InputError(f"no such file: {spec}", hint=f"an input is {FORMS}")
        if path.suffix == ".mc":
            return _program(path.read_text(encoding="utf-8-sig"))
        if path.suffix == ".pt2":
            return _exported(path, ask)
        if path.is_dir() or path.suffix == ".json":
            return _hugging_face(path, ask)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {spec}", str(error), f"an input is {FORMS}") from error
    if path.suffix == ".py":
        raise InputError(f"{spec} holds many things", hint=f"say which: {spec}:name")
    raise InputError(f"cannot tell what {spec} is", hint=f"an input is {FORMS}")


def _program(text: str) -> Program:
    from memcomp.ir.text import parse
    from memcomp.ir.verify import verify

    program = parse(text)
    verify(program)
    return program


def _module(name: str) -> Any:
    """The module of that name, or in that file."""
    file = Path(name) if name.endswith(".py") else None
    if file is None and not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{name!r} is not the name of a module", hint=f"an input is {FORMS}")
    if file is not None and not file.is_file():
        raise InputError(f"no such file: {name}", hint=f"an input is {FORMS}")
    folder = str(file.parent.resolve()) if file else ""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return import_module(name) if file is None else _of_file(file)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {name}", str(error), "run where the module can be imported") from error
    except Exception as error:
        hint = f"python {name} shows it whole" if file else f'python -c "import {name}" shows it whole'
        raise _fault(f"cannot import {name}", error, hint) from error


def _of_file(file: Path) -> Any:
    """Under its own name, as Python would import it, unless a module of that name is there already."""
    name = file.stem if file.stem not in sys.modules else str(file)
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _factory(spec: str, ask: Asked) -> Function:
    module_name, _, named_there = spec.rpartition(":")
    name, at, chosen = named_there.partition("@")  # of a Relax module's functions
    module = _module(module_name)
    if not hasattr(module, name):
        raise InputError(f"{module_name} has no {name!r}", hint=nearest(name, [n for n in vars(module) if n[0] != "_"]))
    named = getattr(module, name)
    if _is_relax(named):
        return _relax(spec, named, ask, chosen)
    if not callable(named):
        raise InputError(f"{spec} is not a function", f"it is {type(named).__name__}",
                         "name a function that returns (callable, example inputs)")
    if ask.inputs and not at and _is_meant(named, ask):
        if ask.arguments:
            raise OptionError(f"--arg is for what makes a function, and {spec} has the inputs itself",
                              hint="give all of its inputs with --input")
        return _filled(named, (), ask)
    arguments = {k: _value(spec, named, k, v) for k, v in ask.arguments.items()}
    try:
        made = named(**arguments)
    except Exception as error:
        said = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        raise _fault(f"{spec} fails", error, "a factory takes nothing but --arg and returns (callable, example inputs);"
                     " a function itself needs --input for its inputs; "
                     f'python -c "from {module.__name__} import {name}; {name}({said})" shows it whole') from error
    if _is_relax(made):
        return _relax(spec, made, ask, chosen)
    if at:
        raise InputError(f"{module_name}:{name} is no Relax module, and has no functions to choose from",
                         hint=f"drop @{chosen}")
    if callable(made) and ask.inputs:
        return _filled(made, (), ask)
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, list))):
        raise InputError(f"{spec} did not return (callable, example inputs)", f"it returned {type(made).__name__}",
                         "e.g. return model, (tokens,); or give the inputs of what it returns with --input")
    if not (ask.inputs or ask.dynamic):  # what a callable makes of its inputs is its own affair
        return Function(by_position(made[0]), tuple(made[1]))
    return _filled(made[0], tuple(made[1]), ask)


def _filled(fn: Callable[..., Any], examples: tuple[Any, ...], ask: Asked) -> Function:
    fn = by_position(fn)
    return Function(fn, *filled(fn, examples, ask))


def _is_relax(x: Any) -> bool:
    """Is it an IRModule of TVM's, which only somebody can have made who has imported TVM?"""
    return "tvm" in sys.modules and isinstance(x, sys.modules["tvm"].IRModule)


def _relax(spec: str, module: Any, ask: Asked, name: str) -> Function:
    from memcomp.capture.relax.whole import function

    if ask.inputs or ask.dynamic:
        raise OptionError(f"{spec} says itself what its inputs are, and which of their extents are open",
                          hint="a symbolic size of the Relax function is open")
    return Function(*function(module, name))


def _is_meant(named: Callable[..., Any], ask: Asked) -> bool:
    """Is it to be compiled itself?  Then it, not what it would return, has the inputs; a class is always called."""
    if isinstance(named, type):
        return False
    needed = [p.name for p in parameters(named) if p.default is p.empty and p.kind not in (
        p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    any_number = any(p.kind == p.VAR_POSITIONAL for p in parameters(named))
    return hasattr(named, "forward") or any_number or any(n not in ask.arguments for n in needed) or (
        ask.inputs.keys() <= {p.name for p in parameters(named)})


def _value(spec: str, factory: Callable[..., Any], name: str, text: str) -> Any:
    """An argument of a factory: a dtype's name where it takes dtypes, else as Python writes it, else text."""
    found = {p.name: p for p in inspect.signature(factory).parameters.values()}
    if name not in found and not any(p.kind == p.VAR_KEYWORD for p in found.values()):
        raise OptionError(f"{spec} has no argument {name!r}", hint=nearest(name, found))
    import torch

    from memcomp.dtypes import DTYPES

    if name in found and isinstance(found[name].default, torch.dtype):
        if text not in DTYPES:
            raise OptionError(f"--arg {name}={text}: unknown dtype", hint=nearest(text, DTYPES))
        return DTYPES[text]
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _fault(what: str, error: Exception, hint: str) -> Exception:
    """What the user's own code did wrong, and at which line; an error of memcomp or of a small machine as it is."""
    if isinstance(error, (MemcompError, MemoryError, RecursionError)):
        return error
    last = traceback.extract_tb(error.__traceback__)[-1]
    place, why = f"{last.filename}:{last.lineno}: ", next(iter(str(error).splitlines()), "")
    if isinstance(error, SyntaxError):
        place, why = f"{error.filename}:{error.lineno}: ", error.msg
    elif last.filename == __file__:  # the call itself is what fails
        place = ""
    return InputError(what, f"{place}{type(error).__name__}: {why}", hint)


@contextmanager
def used(given: Program | Function) -> Iterator[None]:
    """Where `given` is run: an error that its function makes without memcomp too is the user's, an InputError."""
    told = [logging.getLogger(name) for name in LOGGERS]
    levels = [x.level for x in told]
    try:
        for x in told if isinstance(given, Function) else ():
            x.setLevel(logging.CRITICAL)
        yield
    except Exception as error:
        if isinstance(given, Function) and type(error).__name__ == "ConstraintViolationError":
            raise InputError("the function fixes an extent that is left open", _violated(str(error), given),
                             "give it as a number, or a range that it allows") from error
        if isinstance(given, Function) and not isinstance(error, (MemcompError, MemoryError, RecursionError)):
            try:
                given.fn(*given.inputs)
            except Exception as own:
                raise _fault("the function fails on its example inputs, without memcomp too", own,
                             "give the inputs that it is called with") from own
        raise
    finally:
        for x, level in zip(told, levels, strict=True):
            x.setLevel(level)


def _violated(told: str, given: Function) -> str:
    """The first fault of a message of torch's, with the names that the user gave."""
    names = given.names

    def extent(found: re.Match[str]) -> str:
        dims = given.dims[names.index(found[1])] if found[1] in names else {}
        return f"{found[1]}.{dims[int(found[2])].name if int(found[2]) in dims else found[2]}"

    line = next((x for x in told.splitlines() if x.startswith("  - ")), told.splitlines()[0]).removeprefix("  - ")
    line = re.sub(r"L\['args'\]\[(\d+)\]", lambda m: names[int(m[1])], line)
    line = re.sub(r"L\['(\w+)'\]", r"\1", line)
    return re.sub(r"(\w+)\.size\(\)\[(\d+)\]", extent, line).partition(". If you're using")[0]


def _exported(path: Path, ask: Asked) -> Function:
    import torch

    if ask.inputs or ask.dynamic or ask.arguments:
        raise OptionError(f"{path} says itself what its inputs are, and which of their extents are open",
                          hint="export it with other inputs, and with dynamic_shapes")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises anything at all for a file of another version
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"torch {torch.__version__} cannot load {path}", why, "export it again with it") from error
    if program.example_inputs is None:
        raise InputError(f"{path} holds no example inputs", hint="export with example inputs")
    args, kwargs = program.example_inputs
    if kwargs:
        raise InputError(f"{path} takes keyword inputs: {', '.join(kwargs)}", hint="export with positional inputs")
    from memcomp.capture import read_exported

    return Function(read_exported(program), tuple(args), _open_dims(program, tuple(args)))


def _open_dims(program: Any, args: tuple[Any, ...]) -> tuple[Mapping[int, Dim], ...]:
    """What an exported program leaves open; () where its inputs are not tensors, one a placeholder."""
    import torch

    user = program.graph_signature.user_inputs
    values: list[Any] = [next((n.meta["val"] for n in program.graph.nodes if n.name == name), None) for name in user]
    if len(user) != len(args) or not all(isinstance(v, torch.Tensor) for v in (*args, *values)):
        return ()
    found: list[dict[int, Dim]] = []
    for value in values:
        found.append({})
        for dim, extent in enumerate(value.shape):
            if isinstance(extent, torch.SymInt) and extent.node.expr.is_Symbol:
                limits = program.range_constraints[extent.node.expr]
                finite = bool(limits.upper < 1 << 40)
                found[-1][dim] = Dim(str(extent), int(limits.lower), int(limits.upper) if finite else None)
    return tuple(found) if any(found) else ()


def _hugging_face(path: Path, ask: Asked) -> Function:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise InputError(f"{path} needs transformers", str(error), "pip install memcomp[hf]") from error
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"no config.json in {folder}", hint=f"an input is {FORMS}")
    try:
        fields = json.loads(file.read_text())
        config = transformers.AutoConfig.for_model(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a Hugging Face config", str(error).splitlines()[0]) from error
    for name, text in ask.arguments.items():
        if not hasattr(config, name):
            raise OptionError(f"{file} has no field {name!r}", hint=nearest(name, config.to_dict()))
        setattr(config, name, _literal(text))
    if path.is_dir() and any(folder.glob("*.safetensors")):
        if ask.arguments:
            raise OptionError(f"the weights in {folder} are for its config as it is", hint="name config.json itself")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    else:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    length = min(64, getattr(config, "max_position_embeddings", 64))
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    model.eval()
    return Function(model, *(filled(model, (tokens,), ask) if ask.inputs or ask.dynamic else ((tokens,),)))


def workloads() -> list[tuple[str, str]]:
    """(name, first line of its docstring) of every file of `memcomp.models`; the folder is the registry.

    Each has `build(**kw) -> (nn.Module, inputs)`; it is an input as `memcomp.models.<name>:build`.
    """
    import ast
    from importlib.resources import files

    found = []
    for entry in sorted(files("memcomp.models").iterdir(), key=lambda f: f.name):
        if entry.name.endswith(".py") and not entry.name.startswith("_"):
            text = ast.get_docstring(ast.parse(entry.read_text())) or ""
            found.append((f"memcomp.models.{entry.name[:-3]}:build", text.partition("\n")[0]))
    return found
