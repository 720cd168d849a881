"""Processes that do jobs: a kernel that never ends, or spoils the device for its process, costs one job and no more."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Protocol

from memcomp.ir.errors import MemcompError, Refusal

OK, WRONG, REFUSED, FAILED = "ok", "wrong", "refused", "failed"
START = 30.0  # seconds that a process may take to begin, besides those of its job


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do: the name of a method of `Tasks`, and what it is given."""

    do: str
    given: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.do, *(", ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x)
                                    for x in self.given)))


@dataclass(frozen=True, slots=True)
class Answer:
    """state: `OK`, `WRONG` (it ran, and is not what float64 says), `REFUSED` (by memcomp, with the reason) or `FAILED`
    (it raised, died or never ended).  lost: the process that gave it is of no more use.  seconds: it took."""

    state: str
    why: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    lost: bool = False
    seconds: float = 0.0


def failure(error: BaseException) -> Answer:
    """What torch.compile wraps is what counts."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return Answer(REFUSED if isinstance(error, Refusal) else FAILED, line(error))


def line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = str(error).strip().splitlines()
    name = "" if isinstance(error, MemcompError) else f"{type(error).__name__}: "
    return f"{name}{text[0] if text else ''}"[:300]


def answered(do: Callable[[], Answer]) -> Answer:
    """The answer of a job, whatever goes wrong, and how long it took."""
    begin = time.perf_counter()
    try:
        found = do()
    except Exception as error:
        found = failure(error)
    return replace(found, seconds=round(time.perf_counter() - begin, 3))


class Does(Protocol):
    """What jobs are asked of: its method of a job's name does it."""

    def answer(self, job: Job) -> Answer: ...


class Asked(Protocol):
    """place: the device that it works on; what is timed there is timed alone."""

    @property
    def place(self) -> str: ...
    def ask(self, job: Job, limit: float) -> Answer: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


class Here:
    """Does jobs in this process, without a limit."""

    place = ""

    def __init__(self, make: Callable[[], Does]) -> None:
        self._tasks = make()

    def ask(self, job: Job, limit: float) -> Answer:
        return self._tasks.answer(job)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class Worker:
    """Does jobs in a process of its own, begun with the first one, and anew after one that it did not survive."""

    place = ""

    def __init__(self, make: Callable[[], Does]) -> None:
        """make: called in the process; it must be picklable."""
        self._make = make
        self._one = threading.Lock()  # what is asked while another job runs waits: answers are never mixed up
        self._owner = os.getpid()
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        handle, name = tempfile.mkstemp(prefix="memcomp-", suffix=".log")
        os.close(handle)
        self._log = Path(name)

    def ask(self, job: Job, limit: float) -> Answer:
        """limit: seconds; a process that takes longer is ended, as is one whose answer nobody waited for."""
        if self._owner != os.getpid():  # a fork: the process, and who waits for it, are the parent's
            self._one, self._owner, self._running = threading.Lock(), os.getpid(), None
        with self._one:
            try:
                return self._asked(job, limit)
            except BaseException:  # Ctrl-C: the answer to come would be taken for that of the next job
                self._end()
                raise

    def stop(self) -> None:
        """End the process, from any thread; who waits for it hears that it ended."""
        running = self._running
        if running is not None and self._owner == os.getpid():
            running[0].kill()

    def _asked(self, job: Job, limit: float) -> Answer:
        begin = time.monotonic()
        fresh = self._running is None
        if self._running is None:
            self._running = self._begun()
        process, pipe = self._running
        try:
            pipe.send(job)
            if not pipe.poll(limit + START * fresh):
                raise TimeoutError(f"not done after {time.monotonic() - begin:.0f} s")
            answer: Answer = pipe.recv()
        except (EOFError, OSError) as error:
            why = str(error) if isinstance(error, TimeoutError) else f"its process ended ({_ended(process)})"
            self._end()
            return Answer(FAILED, f"{why}{self._last()}", lost=True, seconds=round(time.monotonic() - begin, 3))
        if answer.lost:
            self._end()
        return answer

    def close(self) -> None:
        if self._owner != os.getpid():
            return
        self.stop()
        free = self._one.acquire(timeout=10.0)  # who waits for an answer hears that the process ended, and lets go
        self._end()
        if free:
            self._one.release()
        self._log.unlink(missing_ok=True)

    def _begun(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """No `multiprocessing.Process`: that runs the user's script again."""
        ours, theirs = Pipe()
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        # on Ctrl-C the one who asks ends it
        code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        code += f"from {__name__} import _serve; _serve({theirs.fileno()}, {str(self._log)!r})"
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL,
                                   pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": paths})
        theirs.close()
        ours.send(self._make)
        return process, ours

    def _end(self) -> None:
        if self._running is not None:
            process, pipe = self._running
            self._running = None
            pipe.close()
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a device may hold it for longer than anybody waits
                process.wait(10.0)

    def _last(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:  # closed in the meantime
            return ""
        return f": {lines[-1][:200]}" if lines else ""


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    with suppress(subprocess.TimeoutExpired):  # its end of the pipe closes a little earlier
        process.wait(1.0)
    return process.returncode


def _serve(handle: int, log: str) -> None:
    """Answer jobs until nobody asks.  What compilers print goes into the log."""
    pipe = Connection(handle)
    out = os.open(log, os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else every worker has a crowd of its own
    tasks: Does = pipe.recv()()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(tasks.answer(job))


def spread(workers: Sequence[Asked], jobs: Iterable[Job], limit: Callable[[], float], until: float,
           done: Callable[[Job, Answer], None]) -> list[Job]:
    """Have jobs done, several at a time, in their order; `done` hears of each.  Jobs are taken, and answers told, one
    at a time.

    limit: seconds that a job may take, asked when it begins.  until: the time (`time.monotonic`) after which none
    begins; returns those.  A single worker answers in this thread.
    """
    waiting, lock = iter(jobs), threading.Lock()
    faults: list[BaseException] = []
    stopped: list[bool] = []

    def serve(worker: Asked) -> None:
        try:
            while not faults and time.monotonic() < until:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                answer = worker.ask(job, limit())
                with lock:
                    if not stopped:
                        done(job, answer)
        except BaseException as error:  # raised where somebody waits
            faults.append(error)

    try:
        together(serve, [(w,) for w in workers])
    except BaseException as error:  # Ctrl-C: nothing more begins, and what runs is told to nobody
        with lock:
            stopped.append(True)
            faults.append(error)
        for w in workers:
            w.stop()
    if faults:
        raise faults[0]
    return list(waiting)


def together(do: Callable[..., object], given: Sequence[tuple[Any, ...]]) -> None:
    """Calls, each in a thread of its own; a single one in this thread."""
    if len(given) == 1:
        do(*given[0])
        return
    threads = [threading.Thread(target=do, args=x, daemon=True) for x in given]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
