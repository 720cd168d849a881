"""A search as it goes: on a terminal a bar with the best so far and the time left, elsewhere nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memcomp.tune.search import State


@contextmanager
def bar(name: str, shown: bool | None = None) -> Iterator[Callable[[State], None]]:
    """A function to tell a search's states to.  shown: or where stderr is a terminal."""
    if not (sys.stderr is not None and sys.stderr.isatty() if shown is None else shown):
        yield lambda state: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                  TextColumn("{task.fields[said]}"),
                  console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None, said="processes start")

        def tell(state: State) -> None:
            progress.update(task, completed=state.done, total=state.of, said=words(state))

        yield tell


def words(s: State) -> str:
    """The best so far, beside the cost model's choice, and the time left."""
    if not math.isfinite(s.best):
        best = "none runs yet"
    else:
        gain = f", {s.model / s.best:.2f}x the cost model's" if math.isfinite(s.model) else ""
        best = f"best {s.best * 1e3:.3g} ms{gain}"
    return f"{best}; at most {max(0.0, s.left):.0f} s left"
