"""The tuner's processes on a Ray cluster: Ray places, starts and ends them, and carries what they are asked and say.

Candidates of one search go to equal devices only, since times of others say nothing of them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from memcomp.cache import environment
from memcomp.cache.entry import digest
from memcomp.ir.errors import OptionError
from memcomp.tune.search import Tuner
from memcomp.tune.tasks import Tasks
from memcomp.workers import FAILED, REFUSED, START, Answer, Does, Job, together


@contextmanager
def tuners(address: str, device: str, workers: int = 0, make: Callable[[], Does] = Tasks) -> Iterator[list[Tuner]]:
    """A tuner for each kind of device of the cluster at `address` (as `ray.init` takes it), the most devices first.

    device: "cpu" or "cuda"; workers: processes, 0: one for each CPU that Ray counts, or for each GPU; make: what they
    do, picklable.  What has other code of memcomp's is left out, and so are CPUs unlike this machine's, for which
    programs are mapped here; stderr is told.  Raises OptionError where Ray or such a device cannot be had.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise OptionError("--ray needs Ray, which is not installed", hint="pip install memcomp[ray]") from error
    begun = not ray.is_initialized()
    try:
        if begun:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise OptionError(f"--ray {address}: there is no cluster", str(error).splitlines()[0][:200],
                          "`ray start --head` begins one; `--ray local` is this machine alone") from None
    there: list[Remote] = []
    try:
        count = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))
        there = [Remote(make, device) for _ in range(min(workers or count, count))]
        together(Remote.begin, [(w,) for w in there])
        found = [w for w in there if w.environment]
        if not found:
            raise OptionError(f"--ray {address}: the cluster has no {device} device that can be had",
                              next((w.why for w in there), f"it counts {count}"))
        yield _kinds(found, device)
    finally:
        for w in there:
            w.close()
        if begun:
            ray.shutdown()


def _kinds(found: list[Remote], device: str) -> list[Tuner]:
    own = environment("cpu")
    kinds: dict[str, list[Remote]] = defaultdict(list)
    for w in found:
        other = [what for part, what in (("code", "memcomp"), ("device", "processor"))
                 if w.environment[part] != own[part] and (part == "code" or device == "cpu")]
        if other:
            print(f"left out: {w.place}: its {other[0]} is not like this machine's", file=sys.stderr)
        else:
            kinds[digest(w.environment)].append(w)
    if not kinds:
        raise OptionError("the cluster has no device that this machine can tune for")
    return [Tuner(kind, there=kind[0].environment) for kind in sorted(kinds.values(), key=len, reverse=True)]


class Remote:
    """Does jobs in a process that Ray begins with the first one, and anew on a like machine after one that it did not
    survive.  place: the node and, of a GPU, its number there; environment: of that."""

    def __init__(self, make: Callable[[], Does], device: str) -> None:
        self.place, self.why = "", ""
        self.environment: Mapping[str, Any] = {}
        self._make, self._device, self._one = make, device, threading.Lock()
        self._actor: Any = None

    def begin(self) -> None:
        """Have a process; `why` says why there is none, and `environment` is empty."""
        import ray

        gpus = 1 if self._device == "cuda" else 0
        made = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(_Serving)
        try:
            self._actor = made.remote(self._make)
            self.place, self.environment = ray.get(self._actor.place.remote(self._device), timeout=2 * START)
        except ray.exceptions.RayError as error:
            self.why, self.environment = _first(error), {}
            self.stop()

    def ask(self, job: Job, limit: float) -> Answer:
        """limit: seconds; a process that takes longer is ended."""
        import ray

        with self._one:
            if self._actor is None:
                was = self.environment
                self.begin()
                if self.environment != was:  # nobody's fault, so nothing is known of the candidate
                    self.stop()
                    self.environment = was
                    return Answer(REFUSED, f"no process on such a device is left: {self.why or self.place}")
            begin, actor = time.monotonic(), self._actor
            try:
                answer: Answer = ray.get(actor.answer.remote(job), timeout=limit)
            except ray.exceptions.GetTimeoutError:
                answer = Answer(FAILED, f"not done after {time.monotonic() - begin:.0f} s", lost=True)
            except ray.exceptions.RayError as error:
                answer = Answer(FAILED, f"its process ended: {_first(error)}", lost=True)
            except BaseException:
                self.stop()
                raise
            if answer.lost:
                self.stop()
            return answer

    def stop(self) -> None:
        """End the process, from any thread; who waits for it hears that it ended."""
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def close(self) -> None:
        self.stop()


class _Serving:
    """What runs in the process."""

    def __init__(self, make: Callable[[], Does]) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to its own count, and kernels run on all cores
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        self._does = make()

    def place(self, device: str) -> tuple[str, dict[str, Any]]:
        import ray

        here = ray.get_runtime_context()
        number = "".join(f" GPU {n}" for n in here.get_accelerator_ids().get("GPU", ()))
        return f"node {here.get_node_id()}{number}", environment(device)

    def answer(self, job: Job) -> Answer:
        return self._does.answer(job)


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
