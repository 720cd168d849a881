"""The best values of a row and their places: each thread keeps a sorted list of its own points in registers.

A point is compared with the last of the list, and moves up to its place where it comes before that.  Lists of several
threads are joined where they are first read: of two sorted lists the better of the i-th of one and the i-th from the
end of the other are the best of both, in an order that a few exchanges sort (Batcher's bitonic merge).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from memcomp.codegen.cuda.express import CTYPES, Point
from memcomp.codegen.cuda.inline import substituted
from memcomp.codegen.cuda.sums import Partial
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Best

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer

LONGEST = 32   # values of a list; with their places and a second list while two are joined these are 192 registers

WORDS = r'''
// does value x with place i come before y with j: the greater one, of equal ones the lower place, a NaN before all
template <class T, class I> INLINE bool before(T x, I i, T y, I j) {
  return x > y || (x != x && y == y) || (i < j && (x == y || (x != x && y != y)));
}
template <class T> struct Lowest { static INLINE T of() { return -INFINITE32; } };
template <> struct Lowest<double> { static INLINE double of() { return -INFINITE64; } };
template <> struct Lowest<long long> { static INLINE long long of() { return -0x7fffffffffffffffLL - 1; } };
template <> struct Lowest<int> { static INLINE int of() { return -0x7fffffff - 1; } };
constexpr int NOWHERE = 0x7fffffff;

// lets a point into a sorted list
template <int K, class T, class I> INLINE void enter(T (&v)[K], I (&p)[K], T x, I i) {
  if (!before(x, i, v[K - 1], p[K - 1])) return;
  v[K - 1] = x;
  p[K - 1] = i;
#pragma unroll
  for (int k = K - 1; k > 0; --k) {
    const bool up = before(v[k], p[k], v[k - 1], p[k - 1]);
    const T high = up ? v[k] : v[k - 1], low = up ? v[k - 1] : v[k];
    const I first = up ? p[k] : p[k - 1], second = up ? p[k - 1] : p[k];
    v[k - 1] = high, v[k] = low, p[k - 1] = first, p[k] = second;
  }
}
INLINE constexpr int power(int k) { return k < 2 ? 1 : 2 * power((k + 1) / 2); }
// the best of two sorted lists, sorted
template <int K, class T, class I> INLINE void merge(T (&v)[K], I (&p)[K], const T (&w)[K], const I (&q)[K]) {
  constexpr int all = power(K);
  T x[all];
  I i[all];
#pragma unroll
  for (int k = 0; k < all; ++k) {
    const int back = all - 1 - k;
    x[k] = k < K ? v[k < K ? k : 0] : Lowest<T>::of();
    i[k] = k < K ? p[k < K ? k : 0] : (I)NOWHERE;
    if (back < K && before(w[back < K ? back : 0], q[back < K ? back : 0], x[k], i[k]))
      x[k] = w[back < K ? back : 0], i[k] = q[back < K ? back : 0];
  }
#pragma unroll
  for (int step = all / 2; step > 0; step /= 2)
#pragma unroll
    for (int k = 0; k < all; ++k)
      if (!(k & step)) {
        const bool up = before(x[k | step], i[k | step], x[k], i[k]);
        const T high = up ? x[k | step] : x[k], low = up ? x[k] : x[k | step];
        const I first = up ? i[k | step] : i[k], second = up ? i[k] : i[k | step];
        x[k] = high, x[k | step] = low, i[k] = first, i[k | step] = second;
      }
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = x[k], p[k] = i[k];
}
struct Best {};
template <int WARPS, class T, int K>
INLINE void from_warp(const T (&x)[K], T (&y)[K], int bit, char *rooms, int &turn) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < K; k += AT_ONCE) {
    T *room = (T *)(rooms + turn * (AT_ONCE * WARPS * 32 * 8));
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (k + i < K) room[(i * WARPS + warp) * 32 + lane] = x[k + i];
    meet<WARPS>();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (k + i < K) y[k + i] = room[(i * WARPS + (warp ^ bit)) * 32 + lane];
  }
}
// joins the lists of threads that differ in these bits of their numbers; then they hold the same
template <class Join, int BITS, int WARPS, class T, class I, int K>
INLINE void combine(T (&v)[K], I (&p)[K], char *rooms, int &turn) {
  T w[K];
  I q[K];
#pragma unroll 1
  for (int bit = 1; bit < 32; bit *= 2)
    if (BITS & bit) {
#pragma unroll
      for (int k = 0; k < K; ++k) w[k] = from_lane(v[k], bit), q[k] = from_lane(p[k], bit);
      merge(v, p, w, q);
    }
  if constexpr ((BITS >> 5) != 0)
#pragma unroll 1
    for (int bit = 1; bit < WARPS; bit *= 2)
      if (BITS >> 5 & bit) {
        from_warp<WARPS>(v, w, bit, rooms, turn);
        from_warp<WARPS>(p, q, bit, rooms, turn);
        merge(v, p, w, q);
      }
}
'''


class Bests:
    """Lists of one kernel."""

    def __init__(self, w: Writer) -> None:
        self.w = w

    def best(self, s: Best) -> None:
        w = self.w
        many = w.k.dim(s.order).capacity
        if many > LONGEST:
            raise Refusal(f"{s.tile} keeps the {many} best of a row, a thread's registers at most {LONGEST}", w.k.name,
                          "the backend tvm keeps them in memory")
        kind = w.scope.tiles[s.tile]
        w.scope.real = kind if kind == "f64" else "f32"
        body, place = substituted(s.body, w.inline), substituted(s.at, w.inline)
        w.sums.settle(body, place)
        mask = w.block.mask(s.over)
        part, own = Partial("best", mask, (s.tile, s.place, s.order)), w.sums.pending.get(s.tile)
        if s.accumulate:
            if own is not None and own != part:
                w.sums.join(s.tile)
                own = None
            if own is None and mask:
                w.sums.divide(s.tile, part)
        else:
            self.empty(part, "")
        with self.rows(part, names=True) as at:
            self.taken(part, at)
            with w.points(s.over, names=True) as inner:
                every = {**at, **inner}
                tests = w.live(s.over, every)
                test = f"if ({' && '.join(tests)}) " if tests else ""
                x, i = w.scope.cast(body, kind, every), w.scope.cast(place, w.scope.tiles[s.place], every)
                w.line(f"{test}enter({self.names[0]}, {self.names[1]}, "
                       f"({CTYPES[kind]})({x}), ({CTYPES[w.scope.tiles[s.place]]})({i}));")
            self.given(part, at)
        w.scope.real = "f32"
        for t in (s.tile, s.place):
            w.sums.pending.pop(t, None)
            if mask:
                w.sums.pending[t] = part

    @property
    def names(self) -> tuple[str, str]:
        return self.w.names["values"], self.w.names["found"]

    def rows(self, part: Partial, names: bool = False) -> AbstractContextManager[dict[str, str]]:
        tile, _, order = part.tiles
        return self.w.points(tuple(d for d in self.w.k.tile(tile).dims if d != order), names=names)

    def each(self, part: Partial, at: Point, statement: str) -> None:
        """A statement for every k of a list; {0} and {1} are its value and place."""
        tile, place, order = part.tiles
        where = {**at, order: "k"}
        n = self.w.k.dim(order).capacity
        self.w.unrolled("k", n, statement.format(self.w.place(tile, where), self.w.place(place, where), *self.names))

    def taken(self, part: Partial, at: Point) -> None:
        """A list of its own, of the numbers that a tile holds of one row."""
        tile, place, order = part.tiles
        n, kinds = self.w.k.dim(order).capacity, (self.w.scope.tiles[tile], self.w.scope.tiles[place])
        for name, kind in zip(self.names, kinds, strict=True):
            self.w.line(f"{CTYPES[kind]} {name}[{n}];")
        self.each(part, at, "{2}[k] = {0}, {3}[k] = {1};")

    def given(self, part: Partial, at: Point) -> None:
        self.each(part, at, "{0} = {2}[k], {1} = {3}[k];")

    def empty(self, part: Partial, unless: str) -> None:
        """Lists that hold nothing yet, or nothing more where a condition holds."""
        kind = CTYPES[self.w.scope.tiles[part.tiles[0]]]
        test = f"if ({unless}) " if unless else ""
        with self.rows(part) as at:
            self.each(part, at, f"{test}{{0}} = Lowest<{kind}>::of(), {{1}} = NOWHERE;")

    def join(self, part: Partial) -> None:
        """The list of all threads, in each of them."""
        w = self.w
        with self.rows(part, names=True) as at:
            self.taken(part, at)
            w.line(f"combine<Best, {part.mask}, {w.block.warps}>({', '.join(self.names)}, {w.rooms}, {w.turn});")
            self.given(part, at)

