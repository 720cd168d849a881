"""The order of machine code around asynchronous products (sm_90): what runs while the tensor cores do.

`wgmma` is asynchronous: its issue (`HGMMA`) and the wait for it (`WARPGROUP.DEPBAR.LE gsb0, n`: at most n groups are
still in flight) are two instructions, and only what stands between them costs no time of the tensor cores.  The
assembler moves a wait above arithmetic that does not read what it waits for, but not over the edge of a basic block.
So what the text says is no proof; this reads the proof off the machine code, which `Binary.sass` gives as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

EDGE, WAIT = "EDGE", "WAIT"
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?PT?\w*)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)")
_LABEL = re.compile(r"^(\.L_\w+|\.text\.\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_LEAVES = ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass(frozen=True, slots=True)
class Event:
    """HGMMA, `MUFU.EX2` and other functions, WAIT, or EDGE: a new basic block.

    count: how many of the same stand one after another, other instructions between them not counted.
    left:  of a WAIT, how many groups may still be in flight after it.
    """

    name: str
    count: int = 1
    left: int = 0

    def __str__(self) -> str:
        if self.name == WAIT:
            return f"{WAIT} {self.left}"
        return self.name + (f" x{self.count}" if self.count > 1 else "")


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop with products in it and no such loop inside: its first label, its events in the order of addresses."""

    where: str
    events: tuple[Event, ...]

    def __str__(self) -> str:
        return f"{self.where}: " + ", ".join(map(str, self.events))

    def count(self, name: str) -> int:
        return sum(e.count for e in self.events if e.name == name)

    @property
    def covered(self) -> int:
        """Exponentials that run while a product does: those with an HGMMA before them since the last wait for all."""
        flying, n = False, 0
        for e in self.events:
            flying = flying or e.name == "HGMMA"
            if e.name == WAIT and not e.left:
                flying = False
            n += e.count if flying and e.name == "MUFU.EX2" else 0
        return n


def loops(sass: str) -> tuple[Loop, ...]:
    """The innermost loops of products, in the order of addresses.  Raises ValueError for text that holds no code."""
    blocks = _blocks(sass)
    if not blocks:
        raise ValueError("no machine code in the text")
    bodies: dict[str, frozenset[str]] = {}
    over = _dominators(blocks)
    for name, block in blocks.items():
        for head in block.next:
            if name in over and head in over[name]:
                bodies[head] = bodies.get(head, frozenset()) | _body(blocks, head, name)
    of_products = {h: b for h, b in bodies.items() if any("HGMMA" in e.name for x in b for e in blocks[x].events)}
    out = []
    for head, body in of_products.items():
        if not any(other < body for other in of_products.values()):
            out.append(Loop(head, tuple(_joined(blocks[x].events for x in blocks if x in body and blocks[x].events))))
    return tuple(out)


def faults(sass: str, consumers: int = 2) -> tuple[str, ...]:
    """What keeps a warp-specialised kernel from computing exponentials beside products; empty where nothing does.

    Wanted: registers change hands (USETMAXREG), blocks come by TMA (UTMALDG), nothing is spilled (STL), and each of the
    `consumers` has a loop whose events are HGMMA, WAIT 1, all the exponentials of the loop, EDGE, WAIT 0.  Loops
    without exponentials are not asked.
    """
    out = [f"no {name}" for name in ("USETMAXREG", "UTMALDG") if not re.search(rf"\b{name}\b", sass)]
    if spilled := len(re.findall(r"\bSTL\b", sass)):
        out.append(f"STL x{spilled}")
    found = [x for x in loops(sass) if x.count("MUFU.EX2")]
    if len(found) < consumers:
        out.append(f"{len(found)} loops with products and exponentials, {consumers} consumers")
    return tuple(out + [f"{x.where}: {why}; {x}" for x in found if (why := _fault(x))])


def _fault(loop: Loop) -> str:
    names = [(e.name, e.left) for e in loop.events]
    if (WAIT, 1) not in names:
        return "nothing waits for one product while another runs"
    first = names.index((WAIT, 1))
    if (WAIT, 0) not in names[first:]:
        return "nothing waits for the second product"
    last = names.index((WAIT, 0), first)
    if "HGMMA" not in (n for n, _ in names[:first]):
        return "no product stands before the first wait"
    within = sum(e.count for e in loop.events[first:last] if e.name == "MUFU.EX2")
    if within < loop.count("MUFU.EX2"):
        return f"{within} of {loop.count('MUFU.EX2')} exponentials stand between WAIT 1 and WAIT 0"
    return "" if (EDGE, 0) in names[first:last] else "no edge of a basic block keeps WAIT 0 where it is"


@dataclass(frozen=True, slots=True)
class _Block:
    events: tuple[Event, ...]
    next: tuple[str, ...]


def _blocks(sass: str) -> dict[str, _Block]:
    """Basic blocks by label, in the order of addresses; those after a branch have none and get one."""
    parts: list[tuple[str, list[tuple[str, str, str]]]] = [("", [])]
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            parts.append((label[1], []))
        elif found := _LINE.match(line):
            parts[-1][1].append((found[1] or "", found[2], found[3]))
            if found[2].split(".")[0] in ("BRA", *_LEAVES):
                parts.append((f"after {len(parts)}", []))
    parts = [p for p in parts if p[1] or p[0].startswith(".")]
    out = {}
    for n, (name, lines) in enumerate(parts):
        after = parts[n + 1][0] if n + 1 < len(parts) else ""
        predicate, word, rest = lines[-1] if lines else ("", "", "")
        target = _TARGET.search(rest) if word.split(".")[0] == "BRA" else None
        falls = bool(predicate) or (not target and word.split(".")[0] not in _LEAVES) or "," in rest and bool(target)
        out[name] = _Block(tuple(e for _, w, r in lines for e in _event(w, r)),
                           tuple(x for x in (target[1] if target else "", after if falls else "") if x))
    return {n: _Block(b.events, tuple(x for x in b.next if x in out)) for n, b in out.items()}


def _event(word: str, rest: str) -> Iterator[Event]:
    if word.startswith("HGMMA"):
        yield Event("HGMMA")
    elif word.startswith("MUFU"):
        yield Event(word)
    elif word.startswith("WARPGROUP.DEPBAR"):
        yield Event(WAIT, left=int(rest.split(",")[-1].strip(), 0))


def _joined(blocks: Iterator[tuple[Event, ...]]) -> Iterator[Event]:
    """Events of blocks one after another, an EDGE between two, equal neighbours as one."""
    held: Event | None = None
    for n, events in enumerate(blocks):
        for e in ((Event(EDGE),) if n else ()) + events:
            if held and held.name == e.name not in (WAIT, EDGE):
                held = Event(e.name, held.count + e.count)
            else:
                if held:
                    yield held
                held = e
    if held:
        yield held


def _dominators(blocks: Mapping[str, _Block]) -> dict[str, frozenset[str]]:
    """For each block that is reached: those that every way to it from its function's start goes through."""
    before: dict[str, list[str]] = {n: [] for n in blocks}
    for n, b in blocks.items():
        for x in b.next:
            before[x].append(n)
    out = {n: frozenset((n,)) for n in blocks if n.startswith(".text.")}
    changed = True
    while changed:
        changed = False
        for n in blocks:
            known = [out[p] for p in before[n] if p in out]
            if known and not n.startswith(".text."):
                now = frozenset.intersection(*known) | {n}
                changed |= out.get(n) != now
                out[n] = now
    return out


def _body(blocks: Mapping[str, _Block], head: str, end: str) -> frozenset[str]:
    """The blocks of the loop from `head` that `end` closes."""
    body, left = {head, end}, [end]
    while left:
        at = left.pop()
        for n, b in blocks.items():
            if at != head and at in b.next and n not in body:
                body.add(n)
                left.append(n)
    return frozenset(body)
