"""A block of threads: partitions that run in any order, and transfers that end when they like.

Partitions take turns at the operations that meet others; a seed decides who goes on, and when a transfer ends.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memcomp.codegen.gluon.model.layouts import Layout
from memcomp.codegen.gluon.model.memory import Allocation, Barrier, Box, Partition, Product, Shared, Transfer, place
from memcomp.codegen.gluon.model.values import DType, Fault, Tensor, here


class _Stopped(BaseException):
    """Another partition failed."""


class Block:
    """One block of threads: runs the text of a kernel for one program, parts of it in turns."""

    def __init__(self, program: Sequence[int], grid: Sequence[int], warps: int, seed: int) -> None:
        self.program, self.grid = tuple(program), tuple(grid)
        self.random = random.Random(f"{seed} {self.program}")
        self.parts = [Partition("the parent", warps)]
        self.current = self.parts[0]
        self.transfers: list[Transfer] = []
        self.all_transfers: list[Transfer] = []
        self.allocations: list[Allocation] = []
        self.events = 0
        self.fault: BaseException | None = None
        self.rank: dict[Any, float] = {}
        self.split = False

    # events

    def event(self) -> int:
        """A new one, that nobody knows."""
        self.events += 1
        return 1 << self.events

    def own(self) -> int:
        """A new one, that the partition which runs knows."""
        e = self.event()
        self.current.known |= e
        return e

    # turns

    def step(self, ready: Callable[[], bool] | None = None, why: Callable[[], str] = str) -> None:
        """Let others run; come back when `ready`.  Every operation that meets others begins with it."""
        me = self.current
        if ready is None and not self.split and not self.transfers:
            return
        me.ready, me.why = ready, why
        self._pass(me)

    def _pass(self, me: Partition) -> None:
        chosen = self._choose()
        if chosen is not me:
            chosen.turn.release()
            if me.done:
                return
            me.turn.acquire()
        if self.fault is not None:
            raise _Stopped
        self.current = me
        me.ready = None

    def _choose(self) -> Partition:
        """Who goes on.  Ranks that are drawn anew now and then let one run far ahead of another."""
        while True:
            can: list[Any] = [p for p in self.parts if not p.done and (p.ready is None or p.ready())]
            if self.transfers:
                can.append(None)
            if not can:
                waits = "\n    ".join(f"{p.name} waits for {p.why()}" for p in self.parts if not p.done)
                self.fail(Fault(f"all wait:\n    {waits}"))
                return next(p for p in self.parts if not p.done)
            if self.random.random() < 0.2:
                self.rank[self.random.choice(can)] = self.random.random()
            chosen = max(can, key=lambda p: self.rank.setdefault(p, self.random.random()))
            if chosen is None:
                self.transfers.pop(self.random.randrange(len(self.transfers))).finish()
            else:
                return chosen  # type: ignore[no-any-return]

    def fail(self, fault: BaseException) -> None:
        self.fault = self.fault or fault

    # the life of a block

    def run(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """The whole kernel.  Raises Fault."""
        place.block = self
        try:
            function(*args)
            while self.transfers:
                self.transfers.pop().finish()
            self._ended(self.parts[0])
            self._left()
        except _Stopped:
            assert self.fault is not None
            raise self.fault from None
        finally:
            place.block = None

    def specialize(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Sequence[int]) -> Any:
        """The first function in this partition, each other in one of its own, until all have returned."""
        if self.split:
            raise Fault("warps are specialised twice at once")
        if len(warps) != len(functions) - 1:
            raise Fault(f"{len(functions) - 1} partitions and {len(warps)} counts of warps")
        parent = self.parts[0]
        for _, args in functions:
            if not isinstance(args, tuple):
                raise Fault("the arguments of a partition are no tuple")
        for _, args in functions[1:]:
            if any(isinstance(a, Tensor) and a.shape or isinstance(a, Product) for a in args):
                raise Fault("a block of registers is given to other warps")
        if parent.flight:
            raise Fault("a product is in flight where warps part")
        workers = [Partition(f"{f.__name__} (partition {n + 1})", w, parent.known, parent.fenced)
                   for n, ((f, _), w) in enumerate(zip(functions[1:], warps, strict=True))]
        self.parts += workers
        self.split = True
        threads = [threading.Thread(target=self._work, args=(p, f, a), daemon=True)
                   for p, (f, a) in zip(workers, functions[1:], strict=True)]
        for t in threads:
            t.start()
        name, parent.name = parent.name, f"{functions[0][0].__name__} (partition 0)"
        try:
            out = functions[0][0](*functions[0][1])
            self._ended(parent)
            self.step(lambda: all(p.done for p in workers), lambda: "the other partitions to end")
        except _Stopped:
            raise
        except BaseException as error:
            self.fail(error)
            raise _Stopped from None
        finally:
            if self.fault is not None:
                for p in workers:
                    p.turn.release()
            for t in threads:
                t.join()
        parent.name, self.split, self.parts = name, False, [parent]
        for p in workers:
            parent.known, parent.fenced = parent.known | p.known, parent.fenced | p.fenced
        return out

    def _work(self, me: Partition, function: Callable[..., Any], args: Sequence[Any]) -> None:
        me.turn.acquire()
        place.block = self
        try:
            if self.fault is None:
                self.current = me
                with np.errstate(all="ignore"):
                    function(*args)
                self._ended(me)
        except _Stopped:
            pass
        except BaseException as error:
            self.fail(error)
        me.done = True
        if self.fault is not None:
            self.parts[0].turn.release()
        else:
            self._pass(me)

    def _ended(self, me: Partition) -> None:
        if me.flight:
            raise Fault(f"{me.name} ends and the product at {me.flight[-1].what} is in flight")
        if me.stores:
            raise Fault(f"{me.name} ends and a store is in flight")

    def _left(self) -> None:
        """What must not be left when all have ended."""
        known = self.parts[0].known
        for t in self.all_transfers:
            if not t.event & known:
                raise Fault(f"nothing waited for the transfer at {t.what}")
        for a in self.allocations:
            for b in a.barriers.values():
                if b.pending != b.count or b.bytes:
                    raise Fault(f"a phase was begun and not ended; {b}")

    # what the units do

    def allocate(self, dtype: DType, shape: Sequence[int], layout: Layout) -> Shared:
        if self.split:
            raise Fault("shared memory is allocated by one partition of several")
        data = np.full(tuple(int(n) for n in shape), np.nan if dtype.kind == "f" else 0, dtype.numpy)
        made = Allocation(f"{here().split(':')[-1].split('=')[0].strip()}", dtype, data)
        self.allocations.append(made)
        return Shared(made, data, data, layout)

    def init(self, view: Shared, count: int) -> None:
        if view.place in view.of.barriers:
            raise Fault(f"{view.of.name} is initialised twice")
        name = view.of.name + (f"[{view.place}]" if view.of.data.size > 1 else "")
        view.of.barriers[view.place] = Barrier(name, int(count), int(count))

    def arrive(self, view: Shared, n: int, expected: int = 0) -> None:
        self.step()
        me, barrier = self.current, view.barrier
        barrier.bytes += expected
        barrier.arrived(n, me.known, me.fenced)

    def wait(self, view: Shared, phase: Any) -> None:
        parity, barrier, line = int(phase), view.barrier, here()
        if parity not in (0, 1):
            raise Fault(f"a barrier's phase is 0 or 1, not {parity}")
        self.step(lambda: barrier.phase & 1 != parity, lambda: f"phase {parity} of {barrier}; {line}")
        me = self.current
        me.known, me.fenced = me.known | barrier.done[0], me.fenced | barrier.done[1]

    def transfer(self, source: np.ndarray[Any, Any], to: Shared, barrier: Shared) -> None:
        self.step()
        event = self.event()
        to.of.write(to.region, event, False, self.current)
        to.data[...] = np.nan if to.dtype.kind == "f" else 0
        made = Transfer(source, to, barrier.barrier, event, here())
        self.transfers.append(made)
        self.all_transfers.append(made)

    def send(self, source: Shared, to: Box) -> None:
        """Shared memory to the tensor's; what is sent may be written again after `sent`."""
        self.step()
        event = self.event()
        source.of.read(source.region, event, False, self.current)
        self.current.stores.append(event)
        to.store(source.data)

    def sent(self, left: int) -> None:
        """Wait until at most so many stores still read."""
        self.step()
        while len(self.current.stores) > left:
            self.current.known |= self.current.stores.pop(0)

    def product(self, left: Tensor | Shared, right: Shared, total: Tensor | Product, adds: bool) -> Product:
        self.step()
        me, event = self.current, self.event()
        for x in (left, right):
            if isinstance(x, Shared):
                x.of.read(x.region, event, False, me)
            else:
                _ = x.data
        if isinstance(total, Tensor):
            _ = total.data
        elif total not in me.flight and total.value is None:
            raise Fault("a product is summed up on that of another partition")
        made = Product(left, right, total, adds, total.layout, event, here())
        me.flight.append(made)
        return made

    def drain(self, left: int) -> None:
        """Wait until at most so many products are in flight."""
        self.step()
        me = self.current
        while len(me.flight) > left:
            first = me.flight.pop(0)
            first.finish()
            me.known |= first.event

    def fence(self) -> None:
        self.step()
        self.current.fenced |= self.current.known
