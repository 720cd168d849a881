"""Processes that do jobs: a kernel that never ends, or spoils the device for its process, costs one job and no more."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from memcomp.bench.tasks import FAILED, Answer, Job, Tasks

START = 60.0  # seconds that a process may take to begin, besides those of its job


class Asked(Protocol):
    def ask(self, job: Job, limit: float) -> Answer: ...
    def close(self) -> None: ...


class Here:
    """Does jobs in this process, without a limit."""

    def __init__(self, rehearse: bool, target: str = "") -> None:
        self._tasks = Tasks(rehearse, target)

    def ask(self, job: Job, limit: float) -> Answer:
        return self._tasks.answer(job)

    def close(self) -> None:
        pass


class Worker:
    """Does jobs in a process of its own, begun with the first one, and anew after one that it did not survive."""

    def __init__(self, rehearse: bool, target: str = "") -> None:
        self._given = rehearse, target
        self._running: tuple[multiprocessing.process.BaseProcess, Connection] | None = None
        handle, name = tempfile.mkstemp(prefix="memcomp-bench-", suffix=".log")
        os.close(handle)
        self._log = Path(name)

    def ask(self, job: Job, limit: float) -> Answer:
        """limit: seconds; a process that takes longer is ended."""
        begin = time.monotonic()
        fresh = self._running is None
        if self._running is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, *self._given, str(self._log)), daemon=True)
            process.start()
            theirs.close()
            self._running = process, ours
        process, pipe = self._running
        try:
            pipe.send(job)
            if not pipe.poll(limit + START * fresh):
                raise TimeoutError(f"not done after {time.monotonic() - begin:.0f} s")
            answer: Answer = pipe.recv()
        except (EOFError, OSError) as error:
            self._end()
            why = str(error) if isinstance(error, TimeoutError) else f"its process ended ({process.exitcode})"
            return Answer(FAILED, f"{why}{self._last()}", lost=True, seconds=round(time.monotonic() - begin, 3))
        if answer.lost:
            self._end()
        return answer

    def close(self) -> None:
        self._end()
        self._log.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._running is not None:
            process, pipe = self._running
            self._running = None
            pipe.close()
            process.kill()
            process.join()

    def _last(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def _serve(pipe: Connection, rehearse: bool, target: str, log: str) -> None:
    """Answer jobs until nobody asks.  What compilers print goes into the log."""
    out = os.open(log, os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else every worker has a crowd of its own
    tasks = Tasks(rehearse, target)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(tasks.answer(job))


def spread(workers: Sequence[Asked], jobs: Iterable[Job], limit: float, until: float,
           done: Callable[[Job, Answer], None]) -> list[Job]:
    """Have jobs done, several at a time, in their order; `done` hears of each, one at a time.  limit: seconds a job.
    until: the time (`time.monotonic`) after which none is begun; returns those."""
    waiting, lock = deque(jobs), threading.Lock()
    faults: list[BaseException] = []

    def serve(worker: Asked) -> None:
        try:
            while not faults and time.monotonic() < until:
                with lock:
                    if not waiting:
                        return
                    job = waiting.popleft()
                answer = worker.ask(job, limit)
                with lock:
                    done(job, answer)
        except BaseException as error:  # raised where somebody waits
            faults.append(error)

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if faults:
        raise faults[0]
    return list(waiting)
