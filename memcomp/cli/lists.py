"""`memcomp models`, `memcomp targets` and `memcomp demo`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from memcomp.cli import options, out
from memcomp.cli.parser import Commands

if TYPE_CHECKING:
    from memcomp.ir.target import Target


def add(commands: Commands) -> None:
    options.as_json(commands.add("models", models, "List the workloads that come with memcomp.",
                                  ("memcomp models",)))
    options.as_json(commands.add("targets", machines, "List the machines that can be compiled for.",
                                  ("memcomp targets --json",)))
    commands.add("demo", demo, "A real language model, compiled, run and explained.", ("memcomp demo",))


def models(args: argparse.Namespace) -> int:
    from memcomp.inputs import workloads

    return out.table(args, ("name", "what it is"), workloads())


def machines(args: argparse.Namespace) -> int:
    from memcomp.ir.target import target, targets

    return out.table(args, ("name", "backend", "threads", "peak f32", "memory", "figures from"),
                     [_machine(target(n)) for n in targets()])


def _machine(t: Target) -> tuple[str, ...]:
    memory = f"{t.memory.bytes / 2**30:.0f} GiB, " if t.memory.bytes else ""
    return (t.name, t.backend, str(t.threads), f"{t.peak('f32') / 1e9:.0f} GFLOP/s",
            f"{memory}{t.memory.bandwidth / 1e9:.0f} GB/s", t.source)


def demo(args: argparse.Namespace) -> int:
    from memcomp.demo import main

    return int(main() or 0)
