"""Where buffers lie in one piece of memory: two that are needed at the same time share no byte."""

from __future__ import annotations

from collections.abc import Sequence

ALIGNED = 64  # bytes: a line of the cache


def placed(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """An offset for every buffer, and the bytes of all together.

    sizes: bytes; lives: first and last step at which each is needed.  The largest is placed first, each in the smallest
    hole between those that are needed while it is: greedy by size, which Pisarchyk and Lee ("Efficient Memory
    Management for Deep Neural Net Inference", 2020) found within a few per cent of the bound on networks.
    """
    offsets = [0] * len(sizes)
    done: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], lives[k], k)):
        size, (first, last) = _rounded(sizes[k]), lives[k]
        end, best = 0, None
        for j in sorted((j for j in done if lives[j][0] <= last and first <= lives[j][1]), key=offsets.__getitem__):
            hole = offsets[j] - end
            if hole >= size and (best is None or hole < best[0]):
                best = hole, end
            end = max(end, offsets[j] + _rounded(sizes[j]))
        offsets[k] = end if best is None else best[1]
        done.append(k)
    return offsets, max((o + _rounded(s) for o, s in zip(offsets, sizes, strict=True)), default=0)


def least(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> int:
    """Bytes that no placing can do without: the most that is needed at one step."""
    steps = {first for first, _ in lives}
    return max((sum(_rounded(s) for s, (a, b) in zip(sizes, lives, strict=True) if a <= t <= b) for t in steps),
               default=0)


def _rounded(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED
