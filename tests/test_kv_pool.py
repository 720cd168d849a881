"""A pool of pages against a model of it: lists of tokens that share nothing."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from memcomp.ir.errors import InputError  # noqa: E402
from memcomp.kv.pool import OutOfPages, PagedPool  # noqa: E402


def held(pool: PagedPool, tokens: "torch.Tensor", sequence: int) -> list[int]:
    """What a reader of the table finds."""
    t = pool.table([sequence])
    pages = tokens[t.indices.long()]
    if not len(pages):
        return []
    return [*pages[:-1].flatten().tolist(), *pages[-1, :int(t.last_page_len[0])].tolist()]


@pytest.mark.parametrize(("page", "operations"), [(1, 2_000), (4, 10_000), (16, 1_000)])
def test_ten_thousand_operations(page: int, operations: int) -> None:
    """No leak, no cross-talk, no lost token; out of pages leaves every sequence as it was."""
    rng, pages = random.Random(page), max(40, 320 // page)
    tokens = torch.zeros(pages, page, dtype=torch.int64)
    other = torch.zeros(pages, page, 3, dtype=torch.int64)
    pool = PagedPool(pages, page, (tokens, other))
    model: dict[int, list[int]] = {}
    written = refused = 0
    for step in range(operations):
        act = rng.choices(("new", "append", "fork", "free", "evict", "truncate"), (4, 40, 8, 12, 8, 8))[0]
        some = rng.choice(sorted(model)) if model else 0
        if act == "new" or not model:
            model[pool.new()] = []
        elif act == "append":
            counts = {s: rng.choice((0, 1, 1, 2, page, 3 * page + 1)) for s in rng.sample(
                sorted(model), min(3, len(model)))}
            try:
                slots = pool.append(counts)
            except OutOfPages:
                refused += 1
            else:
                for s, n in counts.items():
                    new = list(range(written, written + n))
                    written += n
                    tokens.view(-1)[slots[s]] = torch.tensor(new, dtype=torch.int64)
                    other.view(-1, 3)[slots[s]] = torch.tensor(new, dtype=torch.int64)[:, None]
                    model[s] += new
        elif act == "fork":
            model[pool.fork(some)] = model[some].copy()
        elif act == "free":
            pool.free(some)
            del model[some]
        elif act == "evict":
            whole = -(-len(model[some]) // page)
            a, b = sorted(rng.randint(0, whole) for _ in range(2))
            pool.evict(some, min(a * page, len(model[some])), min(b * page, len(model[some])))
            del model[some][a * page:b * page]
        else:
            keep = rng.randint(0, len(model[some]))
            pool.truncate(some, keep)
            del model[some][keep:]
        assert {s: pool.length(s) for s in pool.sequences} == {s: len(x) for s, x in model.items()}
        if step % 100 == 0:
            assert all(held(pool, tokens, s) == x for s, x in model.items())
            assert all(other.view(-1, 3)[pool.slots(s)].tolist() == [[t] * 3 for t in x] for s, x in model.items())
            used = {int(p) for s in model for p in pool.table([s]).indices}
            assert pool.free_pages == pages - len(used)
    assert refused and written > operations
    for s in list(model):
        pool.free(s)
    assert pool.free_pages == pages


def test_what_is_wrong_is_said_and_changes_nothing() -> None:
    pool = PagedPool(4, 8)
    a, b = pool.new(), pool.new()
    pool.append({a: 12})
    with pytest.raises(OutOfPages, match="3 more pages are needed, 2 of 4 are free"):
        pool.append({a: 1, b: 17})
    assert (pool.length(a), pool.length(b), pool.free_pages) == (12, 0, 2)
    for bad in (lambda: pool.append({99: 1}), lambda: pool.append({a: -1}), lambda: pool.truncate(a, 13),
                lambda: pool.evict(a, 4, 8), lambda: pool.slots(a, 3, 2), lambda: pool.fork(0),
                lambda: PagedPool(0, 8), lambda: PagedPool(3, 8, (torch.zeros(4, 8),))):
        with pytest.raises(InputError):
            bad()
    assert (pool.length(a), pool.free_pages) == (12, 2)


def test_two_forks_copy_a_shared_page_once() -> None:
    """The one that writes last keeps the page: exactly as many pages are asked for as are needed."""
    pool = PagedPool(2, 8)
    a = pool.new()
    pool.append({a: 4})
    b = pool.fork(a)
    slots = pool.append({a: 1, b: 1})
    assert not pool.free_pages and slots[a].tolist() != slots[b].tolist()
