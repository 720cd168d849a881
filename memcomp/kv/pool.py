"""Pages of a fixed number of tokens, shared until one sequence writes (PagedAttention: Kwon et al., SOSP 2023).

    pool = PagedPool(pages=1024, page=16, storages=(keys, values))     # storages: [pages, ...], one row a page
    a = pool.new()
    slots = pool.append({a: 40})[a]                # places of 40 tokens: page * 16 + place in the page
    b = pool.fork(a)                               # the same pages; the first write to a shared page copies it
    pool.table([a, b])                             # FlashInfer's table: indptr, indices, last_page_len

The pool keeps count of pages and never reads what they hold.  All or nothing: a call that raises changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memcomp.ir.errors import InputError, MemcompError


class OutOfPages(MemcompError):
    """Fewer pages are free than a call needs."""


@dataclass(frozen=True, slots=True)
class Table:
    """Pages of several sequences one after another, as FlashInfer takes them; all int32.

    indptr: [sequences + 1], where the pages of each begin in indices: [pages held]; last_page_len: [sequences], tokens
    in its last page, 1 to the page's size, 0 where it has no page.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


@dataclass(slots=True)
class _Sequence:
    pages: list[int]
    length: int = 0


class PagedPool:
    """`pages` pages of `page` tokens; `storages` are tensors whose first dim counts pages, copied with them."""

    def __init__(self, pages: int, page: int, storages: Sequence[Tensor] = ()) -> None:
        if pages < 1 or page < 1:
            raise InputError(f"a pool of {pages} pages of {page} tokens holds nothing")
        for n, s in enumerate(storages):
            if not s.dim() or s.shape[0] != pages:
                raise InputError(f"storage {n} has shape {tuple(s.shape)}, the pool {pages} pages",
                                 hint="the first dim of a storage counts pages")
        self.pages, self.page, self.storages = pages, page, tuple(storages)
        self._free = list(range(pages))[::-1]
        self._held = [0] * pages  # by how many sequences
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens that it holds."""
        return self._of(sequence).length

    def new(self) -> int:
        """An empty sequence."""
        return self._named(_Sequence([]))

    def fork(self, sequence: int) -> int:
        """A sequence with the same tokens, which takes no page until one of the two writes."""
        of = self._of(sequence)
        for p in of.pages:
            self._held[p] += 1
        return self._named(_Sequence(of.pages.copy(), of.length))

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other holds are free."""
        self._drop(self._of(sequence).pages)
        del self._sequences[sequence]

    def append(self, counts: Mapping[int, int]) -> dict[int, Tensor]:
        """Places for so many more tokens of each sequence: int64, page * page size + place in the page, in order.

        A last page that others hold too is copied first.  Raises OutOfPages, and then no sequence has changed.
        """
        for sequence, count in counts.items():
            self._of(sequence)
            if count < 0:
                raise InputError(f"{count} tokens for sequence {sequence}", hint="truncate takes tokens back")
        held: dict[int, int] = {}  # of pages that a copy leaves
        copied, needed = [], {}
        for sequence, count in counts.items():
            of = self._sequences[sequence]
            needed[sequence] = -(-(of.length + count) // self.page) - len(of.pages)
            if count and of.length % self.page:
                last = of.pages[-1]
                left = held.setdefault(last, self._held[last])
                if left > 1:
                    held[last] = left - 1
                    copied.append(sequence)
        asked = sum(needed.values()) + len(copied)
        if asked > len(self._free):
            raise OutOfPages(f"{asked} more pages are needed, {len(self._free)} of {self.pages} are free",
                             hint="free or truncate sequences first; none has changed")
        before = [self._sequences[s].pages[-1] for s in copied]
        after = [self._take() for _ in copied]
        for sequence, page in zip(copied, after, strict=True):
            self._sequences[sequence].pages[-1] = page
        self._copy(before, after)
        self._drop(before)
        return {s: self._grown(self._sequences[s], count, needed[s]) for s, count in counts.items()}

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens: rolls back what was only guessed."""
        of = self._of(sequence)
        if not 0 <= length <= of.length:
            raise InputError(f"sequence {sequence} has {of.length} tokens, not {length}")
        kept = -(-length // self.page)
        self._drop(of.pages[kept:])
        of.pages, of.length = of.pages[:kept], length

    def evict(self, sequence: int, first: int, last: int) -> None:
        """Give up the tokens [first, last): whole pages, so that no token changes its place in one.

        The tokens behind move up: what reads positions must have them stored.
        """
        of = self._of(sequence)
        if not 0 <= first <= last <= of.length:
            raise InputError(f"tokens [{first}, {last}) of sequence {sequence}, which has {of.length}")
        if first == last:
            return
        if first % self.page or (last % self.page and last != of.length):
            raise InputError(f"tokens [{first}, {last}) are not whole pages of {self.page}",
                             hint="evict whole pages, or truncate")
        begin, end = first // self.page, -(-last // self.page)
        self._drop(of.pages[begin:end])
        del of.pages[begin:end]
        of.length -= last - first

    def slots(self, sequence: int, first: int = 0, last: int | None = None) -> Tensor:
        """Places of the tokens [first, last), int64; of all by default."""
        of = self._of(sequence)
        end = of.length if last is None else last
        if not 0 <= first <= end <= of.length:
            raise InputError(f"tokens [{first}, {end}) of sequence {sequence}, which has {of.length}")
        token = torch.arange(first, end)
        pages = torch.tensor(of.pages or [0])
        return pages[token // self.page] * self.page + token % self.page

    def table(self, sequences: Iterable[int], device: torch.device | str = "cpu") -> Table:
        """Where readers find these sequences."""
        of = [self._of(s) for s in sequences]
        starts = [0]
        for s in of:
            starts.append(starts[-1] + len(s.pages))
        last = [(s.length - 1) % self.page + 1 if s.length else 0 for s in of]
        return Table(*(torch.tensor(x, dtype=torch.int32, device=device)
                       for x in (starts, [p for s in of for p in s.pages], last)))

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise InputError(f"no sequence {sequence} in this pool",
                             hint=f"it has {', '.join(map(str, self._sequences)) or 'none'}")
        return self._sequences[sequence]

    def _named(self, sequence: _Sequence) -> int:
        self._next += 1
        self._sequences[self._next] = sequence
        return self._next

    def _take(self) -> int:
        page = self._free.pop()
        self._held[page] = 1
        return page

    def _drop(self, pages: Iterable[int]) -> None:
        for p in pages:
            self._held[p] -= 1
            if not self._held[p]:
                self._free.append(p)

    def _copy(self, before: list[int], after: list[int]) -> None:
        if not before:
            return
        for s in self.storages:
            s[torch.tensor(after, device=s.device)] = s[torch.tensor(before, device=s.device)]

    def _grown(self, of: _Sequence, count: int, pages: int) -> Tensor:
        of.pages += [self._take() for _ in range(pages)]
        token = torch.arange(of.length, of.length + count)
        of.length += count
        return torch.tensor(of.pages or [0])[token // self.page] * self.page + token % self.page
