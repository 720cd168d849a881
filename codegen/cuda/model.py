"""A model of a GPU's blocks on the CPU, in C++: what emitted text is compiled with where there is no GPU.

A thread of a block is a coroutine.  It runs up to the next shuffle or barrier; a shuffle is done when all 32 threads of
the warp have come to it, a barrier when all threads of the block have.  Threads that wait for one another at different
places are an error, as are threads that have ended while others wait for them.

Blocks run one after another, each to its end; those of a cooperative launch, of which the model holds a few at a time,
each as far as it comes without the others, in another order each time.  So what one block reads of another is there
only where it has waited for it.  Blocks of which none can go on are an error.
"""

MODEL = r'''
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#define REAL(name) \
  extern "C" double name(double); \
  extern "C" float name##f(float); \
  static inline float name(float x) { return name##f(x); }
REAL(exp) REAL(exp2) REAL(log) REAL(log2) REAL(sin) REAL(cos) REAL(erf) REAL(tanh) REAL(expm1) REAL(log1p) REAL(floor)
REAL(rint) REAL(sqrt) REAL(fabs)
extern "C" double pow(double, double);
extern "C" float powf(float, float);
static inline float pow(float x, float y) { return powf(x, y); }
#define ON_HOST
#define SHARED(name, bytes) char *name = here->rooms
#define SHARED_BYTES(name) char *name = here->staged
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Place { int x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;
enum State { READY, SHUFFLE, BARRIER, LOOK, ENDED };
struct Copy { char *to; const char *from; int bytes, live, group; };
struct Thread {
  ucontext_t start;
  jmp_buf here;
  bool begun;
  State state;
  unsigned long long number;  // what the thread shows to the others
  int other, size;            // how it picks the one that it reads, bytes of the number; barrier, how many meet there
  int copied, groups;
};
constexpr int MOST = 1024, STACK = 1 << 16, COPIES = 1 << 12, HELD = 5;  // blocks that are there at one time
struct Held {
  Thread threads[MOST];
  int number, room;           // threads that there is memory for
  char *stacks;
  Copy (*copies)[COPIES];
  alignas(16) char rooms[1 << 15], staged[1 << 18];
};
static Held *held[HELD], *here;
static jmp_buf back;
static int count, arrived;
static void (*body)(void *);
static void *given;

template <class To, class From> static To bits_as(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
static float __int_as_float(int x) { return bits_as<float>(x); }
static float __uint_as_float(unsigned x) { return bits_as<float>(x); }
static unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static double __longlong_as_double(long long x) { return bits_as<double>(x); }
static float host_from_f16(unsigned bits) {
  int e = bits >> 10 & 31, m = bits & 1023;
  float x = e == 31 ? (m ? __builtin_nanf("") : __builtin_inff()) : __builtin_ldexpf(e ? m + 1024 : m, (e ?: 1) - 25);
  return bits >> 15 ? -x : x;
}
static unsigned short host_to_f16(float x) {
  unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  float a = fabsf(x);
  if (x != x) return 0x7e00;
  if (a >= 65520) return sign | 0x7c00;
  int e;
  __builtin_frexpf(a, &e);
  if (e < -13) e = -13;                   // numbers below 2**-14 are multiples of its unit
  int m = (int)rintf(__builtin_ldexpf(a, 11 - e));  // 1024 to 2048 of them where the number is not below
  return sign | (m + ((e + 13) << 10));
}

static Thread &self() { return here->threads[threadIdx.x]; }
static void wait(State state) {
  self().state = state;
  if (!_setjmp(self().here)) _longjmp(back, 1);
}
template <class T> static T __shfl_xor_sync(unsigned, T x, int other) {
  Thread &t = self();
  t.number = 0;
  memcpy(&t.number, &x, sizeof x);
  t.other = other;
  t.size = sizeof x;
  wait(SHUFFLE);
  memcpy(&x, &self().number, sizeof x);
  return x;
}
static void meet_at(int barrier, int threads) {
  self().other = barrier;
  self().size = threads;
  wait(BARRIER);
}
template <int WARPS> static void meet() { meet_at(1, 32 * WARPS); }
static void __syncthreads() { meet_at(0, count); }
static void __syncwarp() { __shfl_xor_sync(0u, 0, 0); }

// where blocks count those that have come; as on a GPU nobody sets it back between launches
static unsigned come_so_far;
static unsigned *counter() { return &come_so_far; }
static unsigned arrive(unsigned *at, unsigned n) {
  ++arrived;
  const unsigned before = *at;
  *at += n;
  return before;
}
static unsigned look(unsigned *at) {
  wait(LOOK);
  return *at;
}

// what a thread has asked for comes when it waits for it; until then its place holds rubbish
template <int N> static void copy_later(char *to, const char *from, bool live) {
  Thread &t = self();
  if (t.copied == COPIES) abort();
  here->copies[threadIdx.x][t.copied++] = {to, from, N, live, t.groups};
  memset(to, 0xab, N);
}
static void asked() { ++self().groups; }
template <int waiting> static void come() {
  Thread &t = self();
  Copy *copies = here->copies[threadIdx.x];
  int left = 0;
  for (int n = 0; n < t.copied; ++n) {
    Copy c = copies[n];
    if (c.group >= t.groups - waiting) copies[left++] = c;
    else if (c.live) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
  }
  t.copied = left;
}

static void enter() {
  body(given);
  self().state = ENDED;
  _longjmp(back, 1);
}
static void resume(int k) {
  threadIdx.x = k;
  Thread &t = self();
  t.state = READY;
  if (_setjmp(back)) return;
  if (t.begun) _longjmp(t.here, 1);
  t.begun = true;
  setcontext(&t.start);
}
// All threads of a warp up to a barrier, a look at other blocks or the end; false where they part.
static bool run_warp(int first) {
  Thread *warp = here->threads + first;
  for (;;) {
    bool looks = false;
    for (int n = 0; n < 32; ++n) {
      const int k = here->number & 1 ? 31 - n : n;
      if (warp[k].state == READY) resume(first + k);
      looks |= warp[k].state == LOOK;
    }
    if (looks) return true;  // the others wait for those
    for (int k = 1; k < 32; ++k)
      if (warp[k].state != warp[0].state) return false;
    if (warp[0].state != SHUFFLE) return true;
    unsigned long long shown[32];
    for (int k = 0; k < 32; ++k) {
      if (warp[k].other != warp[0].other || warp[k].size != warp[0].size) return false;
      shown[k] = warp[k].number;
    }
    for (int k = 0; k < 32; ++k) {
      warp[k].number = shown[k ^ warp[0].other];
      warp[k].state = READY;
    }
  }
}
// Lets those go on that wait at a barrier to which all have come that meet there; false where nobody does.
static bool met() {
  bool some = false;
  for (int barrier = 0; barrier < 2; ++barrier) {
    int there = 0, wanted = 0;
    bool alike = true;
    for (int k = 0; k < count; ++k) {
      Thread &t = here->threads[k];
      if (t.state == BARRIER && t.other == barrier) ++there, alike &= there == 1 || wanted == t.size, wanted = t.size;
    }
    if (!there || there != wanted || !alike) continue;
    some = true;
    for (int k = 0; k < count; ++k) {
      Thread &t = here->threads[k];
      if (t.state == BARRIER && t.other == barrier) t.state = READY;
    }
  }
  return some;
}
static void begin(Held *block, int number, int shared) {
  here = block;
  here->number = number;
  memset(here->rooms, 0xab, sizeof here->rooms);
  memset(here->staged, 0xab, shared);
  for (int k = 0; k < count; ++k) {
    Thread &t = here->threads[k];
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = here->stacks + (size_t)k * STACK;
    t.start.uc_stack.ss_size = STACK;
    t.start.uc_link = nullptr;
    makecontext(&t.start, enter, 0);
    t.begun = false;
    t.state = READY;
    t.copied = t.groups = 0;
  }
}
// A block as far as it comes by itself.  0: to its end; 1: threads of a warp part; 2: warps do; 3: to a look at others,
// hastily before other warps have come as far
static int run_block(Held *block, bool hastily = false) {
  here = block;
  blockIdx.x = here->number;
  for (int k = 0; k < count; ++k)
    if (here->threads[k].state == LOOK) here->threads[k].state = READY;
  for (;;) {
    bool looks = false, ended = true;
    for (int w = 0; w < count; w += 32) {
      const int first = here->number & 1 ? count - 32 - w : w;
      if (!run_warp(first)) return 1;
      if (hastily && here->threads[first].state == LOOK) return 3;
    }
    for (int k = 0; k < count; ++k) {
      looks |= here->threads[k].state == LOOK;
      ended &= here->threads[k].state == ENDED;
    }
    if (ended) return 0;
    if (met()) continue;
    return looks ? 3 : 2;
  }
}
// 0: done; 1, 2: as above; 3: blocks wait for each other
template <class F> static int simulate(long long blocks, int n, int shared, bool together, F &&kernel) {
  const int most = together && blocks > HELD ? HELD : together ? (int)blocks : 1;
  body = [](void *f) { (*(F *)f)(); };
  given = &kernel;
  count = n;
  blockDim = {n, 1, 1};
  gridDim = {together ? most : (int)blocks, 1, 1};
  for (int b = 0; b < most; ++b)
    if (!held[b] || held[b]->room < n) {
      if (!held[b]) held[b] = (Held *)calloc(1, sizeof(Held));
      held[b]->stacks = (char *)realloc(held[b]->stacks, (size_t)n * STACK);
      held[b]->copies = (Copy(*)[COPIES])realloc(held[b]->copies, sizeof(Copy) * COPIES * n);
      held[b]->room = n;
    }
  if (!together) {
    for (long long b = 0; b < blocks; ++b) {
      begin(held[0], (int)b, shared);
      if (int failed = run_block(held[0])) return failed;
    }
    return 0;
  }
  int order[HELD], left = most, idle = 0;
  for (int b = 0; b < most; ++b) begin(held[b], order[b] = b, shared);
  unsigned luck = 1;
  for (int turn = 0; left; ++turn) {
    const int before = arrived, were = left;
    for (int b = left; b > 1; --b) {
      luck = luck * 1664525 + 1013904223;
      const int other = (luck >> 16) % b, one = order[b - 1];
      order[b - 1] = order[other], order[other] = one;
    }
    for (int b = 0; b < left;) {
      const int failed = run_block(held[order[b]], turn % 2 == 0);
      if (failed && failed != 3) return failed;
      if (failed) ++b;
      else order[b] = order[--left];
    }
    idle = arrived == before && left == were ? idle + 1 : 0;
    if (idle > 2) return 3;
  }
  return 0;
}
'''
