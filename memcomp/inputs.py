"""What a user may name on the command line: `module:factory`, a .pt2 file, a Hugging Face config, a .mc file, `-`."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from memcomp.ir.errors import InputError, MemcompError, nearest
from memcomp.ir.program import Program

FORMS = "module:factory, model.pt2, config.json or its directory, program.mc, or - for a .mc program on stdin"


@dataclass(frozen=True, slots=True)
class Function:
    """A callable and the inputs to call it with."""

    fn: Callable[..., Any]
    inputs: tuple[Any, ...]


def read(spec: str) -> Program | Function:
    """The program or function that `spec` names.

    `module:factory` imports and runs code, and a .pt2 file holds pickled inputs: both must be trusted.
    A Hugging Face config gets random weights; a directory with weights is loaded from disk only.
    Raises InputError (or ParseError for a malformed .mc).
    """
    path = Path(spec)
    try:
        if spec == "-":
            return _program(sys.stdin.read().removeprefix("\ufeff"))
        if not path.exists():
            if ":" in spec:
                return _factory(spec)
            raise InputError(f"no such file: {spec}", hint=f"an input is {FORMS}")
        if path.suffix == ".mc":
            return _program(path.read_text(encoding="utf-8-sig"))
        if path.suffix == ".pt2":
            return _exported(path)
        if path.is_dir() or path.suffix == ".json":
            return _hugging_face(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {spec}", str(error), f"an input is {FORMS}") from error
    raise InputError(f"cannot tell what {spec} is", hint=f"an input is {FORMS}")


def _program(text: str) -> Program:
    from memcomp.ir.text import parse
    from memcomp.ir.verify import verify

    program = parse(text)
    verify(program)
    return program


def _factory(spec: str) -> Function:
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"{module_name!r} is not the name of a module", hint=f"an input is {FORMS}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {module_name}", str(error), "run where the module can be imported") from error
    except Exception as error:
        hint = f'python -c "import {module_name}" shows it whole'
        raise _fault(f"cannot import {module_name}", error, hint) from error
    if not hasattr(module, name):
        raise InputError(f"{module_name} has no {name!r}", hint=nearest(name, [n for n in vars(module) if n[0] != "_"]))
    factory = getattr(module, name)
    if not callable(factory):
        raise InputError(f"{spec} is not a function", f"it is {type(factory).__name__}",
                         "name a function that returns (callable, example inputs)")
    try:
        made = factory()
    except Exception as error:
        raise _fault(f"{spec} fails", error, "a factory takes nothing and returns (callable, example inputs); "
                     f'python -c "import {module_name}; {module_name}.{name}()" shows it whole') from error
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, list))):
        raise InputError(f"{spec} did not return (callable, example inputs)", f"it returned {type(made).__name__}",
                         "e.g. return model, (tokens,)")
    return Function(made[0], tuple(made[1]))


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
    try:
        yield
    except Exception as error:
        if isinstance(given, Function) and not isinstance(error, (MemcompError, MemoryError, RecursionError)):
            try:
                given.fn(*given.inputs)
            except Exception as own:
                raise _fault("the function fails on its example inputs, without memcomp too", own,
                             "give the inputs that it is called with") from own
        raise


def _exported(path: Path) -> Function:
    import torch

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

    return Function(read_exported(program), tuple(args))


def _hugging_face(path: Path) -> Function:
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
    if path.is_dir() and any(folder.glob("*.safetensors")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    else:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    length = min(64, getattr(config, "max_position_embeddings", 64))
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return Function(model.eval(), (tokens,))


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
