"""Tuning candidates that are wrong, crash, hang or eat memory: made where the tuner asks for a kernel."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from memcomp.cache import Choice
from memcomp.pipeline import Compiled
from memcomp.tune.tasks import Tasks, _Work
from memcomp.workers import OK, Answer, Job, answered


class Work(_Work):
    """The cost model's own choice is as it should be, and all others are `how`."""

    how = ""

    def _kernel(self, choice: Choice) -> Compiled:
        made = super()._kernel(choice)
        if choice == self.tunable.modelled:
            return made
        entry = made.entry

        def run(*args: Any) -> None:
            if self.how == "crash":
                os._exit(7)
            elif self.how == "hang":
                time.sleep(3600)
            elif self.how == "memory":
                bytearray(1 << 35)
            entry(*args)
            outs = [a for a, p in zip(args, made.tiles.params, strict=False) if p.role == "out"]
            if self.how == "wrong":
                outs[0].view(-1)[0] += 1e-2  # one element of them all

        return replace(made, entry=run)


class Planted(Tasks):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def answer(self, job: Job) -> Answer:
        given, *rest = job.given
        if self._work is None:
            self._work = Work(given)
            self._work.how = self.how  # type: ignore[attr-defined]
        return answered(lambda: getattr(self._work, job.do)(*rest))


class Quick:
    """Says of every candidate at once that it is right: for what becomes of processes, whatever they do.  model: the
    only one that does not end its process."""

    def __init__(self, model: Choice | None = None) -> None:
        self.model = model

    def answer(self, job: Job) -> Answer:
        _, *rest = job.given
        if job.do == "attempt":
            time.sleep(0.2)
            if self.model not in (None, rest[0]):
                os._exit(7)
        count = len(rest[0]) if job.do == "race" else 0
        return Answer(OK, told={"error": 0.1, "bound": 1.0, "seconds": 1e-3, "rounds": 9, "medians": [1e-3] * count,
                                "spreads": [0.0] * count})


class Timed(Tasks):
    """Plain tasks that note when they time candidates; the process that checks a second one ends, the first time that
    there is one."""

    def __init__(self, folder: str, dies: bool) -> None:
        super().__init__()
        self.folder, self.dies, self.checked = Path(folder), dies, 0

    def answer(self, job: Job) -> Answer:
        self.checked += job.do == "attempt"
        if self.dies and self.checked == 2 and not (self.folder / "dead").exists():
            (self.folder / "dead").write_text(str(job.given[1]))
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.time()
        answer = super().answer(job)
        if job.do in ("time", "race"):
            with (self.folder / f"{os.getpid()}.log").open("a") as file:
                file.write(f"{begin} {time.time()}\n")
        return answer


def noted(file: str) -> Tasks:
    """Plain tasks, which say in a file that they have begun."""
    Path(file).write_text("begun")
    return Tasks()
