"""What a cubin says of itself: registers, stack, shared memory, parameters.  A cubin is an ELF file for 64-bit
little-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from memcomp.ir.errors import Refusal

_FRAME, _REGISTERS = 0x11, 0x2F   # attributes of .nv.info, as `cuobjdump --dump-resource-usage` reads them
_PARAMETER, _MOST, _EXACT = 0x17, 0x05, 0x10   # of .nv.info.<function>: KPARAM_INFO, MAX_THREADS, REQNTID


@dataclass(frozen=True, slots=True)
class Resources:
    """registers: of a thread, at entry where warps are specialised; stack: bytes of local memory a thread, spills
    and more; static: bytes of shared memory that every block has, before what a launch asks for.  From sm_90 on 1,024
    of them are the system's, which no limit of a block counts."""

    registers: int
    stack: int
    static: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a kernel is launched with.  places: (offset, bytes) of each parameter, in order; threads: of a block, the
    most where the text says a bound, 0 where it says nothing."""

    places: tuple[tuple[int, int], ...]
    threads: int


class _Section(NamedTuple):
    name: str
    start: int
    size: int
    link: int


def resources(cubin: bytes, function: str) -> Resources:
    """Of one kernel in the cubin.  Refusal where it is not there."""
    sections = _sections(cubin)
    named = {s.name: s for s in sections}
    info = named.get(".nv.info")
    if info is None:
        raise Refusal("the cubin has no section .nv.info")
    symbols = _symbols(cubin, named[".symtab"], sections[named[".symtab"].link])
    found: dict[int, int] = {}
    for attribute, at, size in _attributes(cubin, info):
        if attribute in (_FRAME, _REGISTERS) and size == 8:
            symbol, value = struct.unpack_from("<II", cubin, at)
            if symbols[symbol] == function:
                found[attribute] = value
    if _REGISTERS not in found:
        raise Refusal(f"the cubin tells no registers of {function!r}")
    static = named.get(f".nv.shared.{function}")
    return Resources(found[_REGISTERS], found.get(_FRAME, 0), static.size if static else 0)


def parameters(cubin: bytes, function: str) -> Parameters:
    """Of one kernel in the cubin.  Refusal where it is not there."""
    info = next((s for s in _sections(cubin) if s.name == f".nv.info.{function}"), None)
    if info is None:
        raise Refusal(f"the cubin has no kernel {function!r}")
    places: dict[int, tuple[int, int]] = {}
    threads = 0
    for attribute, at, size in _attributes(cubin, info):
        if attribute == _PARAMETER and size == 12:
            _, ordinal, offset, word = struct.unpack_from("<IHHI", cubin, at)
            places[ordinal] = (offset, word >> 18)
        elif attribute in (_MOST, _EXACT) and size == 12:
            x, y, z = struct.unpack_from("<III", cubin, at)
            threads = x * y * z
    return Parameters(tuple(places[k] for k in sorted(places)), threads)


def _attributes(cubin: bytes, info: _Section) -> Iterator[tuple[int, int, int]]:
    """(attribute, start, bytes) of the records of a section that have a payload."""
    at, end = info.start, info.start + info.size
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form != 4:   # other forms hold their value in place of a size
            continue
        yield attribute, at, size
        at += size


def _sections(elf: bytes) -> list[_Section]:
    if elf[:5] != b"\x7fELF\x02":
        raise Refusal("this is no cubin: no ELF file of 64 bits")
    table, = struct.unpack_from("<Q", elf, 0x28)
    size, count, strings = struct.unpack_from("<HHH", elf, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    rows = [struct.unpack_from("<IIQQQQIIQQ", elf, table + k * size) for k in range(count)]
    texts = rows[strings][4]
    return [_Section(_text(elf, texts + r[0]), r[4], r[5], r[6]) for r in rows]


def _symbols(elf: bytes, table: _Section, strings: _Section) -> list[str]:
    return [_text(elf, strings.start + struct.unpack_from("<I", elf, at)[0])
            for at in range(table.start, table.start + table.size, 24)]


def _text(elf: bytes, start: int) -> str:
    return elf[start:elf.index(b"\0", start)].decode()
