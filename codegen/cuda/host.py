"""CUDA C++ text on the CPU: compiled by g++ with a model of a block, to check kernels where there is no GPU.

A thread of a block is a coroutine.  It runs up to the next shuffle or barrier; a shuffle is done when all 32 threads of
the warp have come to it, a barrier when all threads of the block have.  Threads that wait for one another at different
places are an error, as are threads that have ended while others wait for them.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memcomp.codegen.cuda.emit import emit, launches
from memcomp.codegen.launches import Launch, Layout, unit
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Kernel

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
_CTYPES = {"i32": ctypes.c_int, "i64": ctypes.c_longlong}
_C = {"i32": "int", "i64": "long long"}

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
#define SHARED_BYTES(name) static __attribute__((aligned(16))) char name[1 << 18]
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct Place { int x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;
enum State { READY, SHUFFLE, BARRIER, ENDED };
struct Thread {
  ucontext_t start;
  jmp_buf here;
  bool begun;
  State state;
  unsigned long long number;  // what the thread shows to the others
  int other, size;            // how it picks the one that it reads; bytes of the number
};
constexpr int MOST = 1024, STACK = 1 << 16;
static Thread threads[MOST];
static char *stacks;
static ucontext_t home;
static jmp_buf back;
static int count;
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

static void wait(State state) {
  Thread &t = threads[threadIdx.x];
  t.state = state;
  if (!_setjmp(t.here)) _longjmp(back, 1);
}
template <class T> static T __shfl_xor_sync(unsigned, T x, int other) {
  Thread &t = threads[threadIdx.x];
  t.number = 0;
  memcpy(&t.number, &x, sizeof x);
  t.other = other;
  t.size = sizeof x;
  wait(SHUFFLE);
  memcpy(&x, &threads[threadIdx.x].number, sizeof x);
  return x;
}
static void __syncthreads() { wait(BARRIER); }
static void __syncwarp() { __shfl_xor_sync(0u, 0, 0); }

// what a thread has asked for comes when it waits for it; until then its place holds rubbish
struct Copy { char *to; const char *from; int bytes, live, group; };
constexpr int COPIES = 1 << 12;
static Copy copies[MOST][COPIES];
static int copied[MOST], groups[MOST];
template <int N> static void copy_later(char *to, const char *from, bool live) {
  int k = threadIdx.x;
  if (copied[k] == COPIES) abort();
  copies[k][copied[k]++] = {to, from, N, live, groups[k]};
  memset(to, 0xab, N);
}
static void asked() { ++groups[threadIdx.x]; }
template <int waiting> static void come() {
  int k = threadIdx.x, left = 0;
  for (int n = 0; n < copied[k]; ++n) {
    Copy c = copies[k][n];
    if (c.group >= groups[k] - waiting) copies[k][left++] = c;
    else if (c.live) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
  }
  copied[k] = left;
}

static void enter() {
  body(given);
  threads[threadIdx.x].state = ENDED;
  _longjmp(back, 1);
}
static void resume(int k) {
  threadIdx.x = k;
  threads[k].state = READY;
  if (_setjmp(back)) return;
  if (threads[k].begun) _longjmp(threads[k].here, 1);
  threads[k].begun = true;
  setcontext(&threads[k].start);
}
// All threads of a warp up to a barrier or the end; false where they part.
static bool run_warp(int first) {
  for (;;) {
    for (int k = 0; k < 32; ++k) resume(first + (blockIdx.x & 1 ? 31 - k : k));
    Thread *warp = threads + first;
    for (int k = 1; k < 32; ++k)
      if (warp[k].state != warp[0].state) return false;
    if (warp[0].state != SHUFFLE) return true;
    unsigned long long shown[32];
    for (int k = 0; k < 32; ++k) {
      if (warp[k].other != warp[0].other || warp[k].size != warp[0].size) return false;
      shown[k] = warp[k].number;
    }
    for (int k = 0; k < 32; ++k) warp[k].number = shown[k ^ warp[0].other];
  }
}
// 0: done; 1: threads of a warp wait at different places; 2: warps do
template <class F> static int simulate(long long blocks, int n, F &&kernel) {
  if (!stacks) stacks = (char *)malloc((size_t)MOST * STACK);
  body = [](void *f) { (*(F *)f)(); };
  given = &kernel;
  count = n;
  blockDim = {n, 1, 1};
  gridDim = {(int)blocks, 1, 1};
  for (long long b = 0; b < blocks; ++b) {
    blockIdx.x = (int)b;
    for (int k = 0; k < n; ++k) {
      getcontext(&threads[k].start);
      threads[k].start.uc_stack.ss_sp = stacks + (size_t)k * STACK;
      threads[k].start.uc_stack.ss_size = STACK;
      threads[k].start.uc_link = nullptr;
      makecontext(&threads[k].start, enter, 0);
      threads[k].begun = false;
      copied[k] = groups[k] = 0;
    }
    do {
      for (int w = 0; w < n; w += 32) {
        if (!run_warp(b & 1 ? n - 32 - w : w)) return 1;
      }
      for (int w = 0; w < n; w += 32)
        if (threads[w].state != threads[0].state) return 2;
    } while (threads[0].state == BARRIER);
  }
  return 0;
}
'''

_lock = threading.Lock()


def interpreted(kernel: Kernel) -> Callable[..., None]:
    """A callable(*tensors, *sizes) in the order of the program's params and sizes, for tensors on any device, copied to
    this machine's memory and back.  Raises Refusal where there is no C++ compiler, or threads wait for each other."""
    tp = kernel.program
    forms: dict[Layout, Form] = {}

    def form(tensors: dict[str, Any]) -> Form:
        layout = Layout(tuple(unit(t.stride()) for t in tensors.values()))
        if loose := _loose(launches(tp, kernel.isa, layout), tensors):
            layout = Layout(layout.units, loose)
        if layout not in forms:
            forms[layout] = Form(emit(tp, kernel.isa, layout).source, launches(tp, kernel.isa, layout))
        return forms[layout]

    def run(*given: Any) -> None:
        if len(given) != len(tp.params) + len(tp.sizes):
            raise TypeError(f"{tp.name} takes {len(tp.params)} tensors and {len(tp.sizes)} sizes, "
                            f"got {len(given)} arguments")
        tensors = {p.name: t.cpu() for p, t in zip(tp.params, given, strict=False)}
        sizes = {r: int(n) for r, n in zip(tp.sizes, given[len(tp.params):], strict=True)}
        with _lock:
            form(tensors).run(tensors, sizes)
        for p, t in zip(tp.params, given, strict=False):
            if p.role != "in" and t is not tensors[p.name]:
                t.copy_(tensors[p.name])

    return run


class Form:
    """The text for one layout of tensors, compiled."""

    def __init__(self, source: str, launches: tuple[Launch, ...]) -> None:
        self.launches = launches
        self.library = compiled(source, launches)

    def run(self, tensors: dict[str, Any], sizes: dict[str, int]) -> None:
        for x in self.launches:
            if not (blocks := math.prod(x.blocks(sizes))):
                continue
            args = [_CTYPES.get(a.type, ctypes.c_void_p)(_value(a, tensors, sizes)) for a in x.args]
            if failed := getattr(self.library, f"run_{x.function}")(ctypes.c_longlong(blocks), *args):
                raise Refusal(f"{x.function} waits for ever: {'threads of a warp' if failed == 1 else 'warps'} wait "
                              "at different places", hint="a fault of the cuda backend")


def _loose(launches: tuple[Launch, ...], tensors: dict[str, Any]) -> frozenset[str]:
    """Arguments that are no multiples of what the text takes for granted."""
    return frozenset(a.name for x in launches for a in x.args
                     if a.multiple > 1 and _value(a, tensors, {}) % a.multiple)


def _value(a: Any, tensors: dict[str, Any], sizes: dict[str, int]) -> int:
    if a.kind == "pointer":
        return int(tensors[a.of].data_ptr())
    return int(tensors[a.of].stride(a.at)) if a.kind == "stride" else sizes[a.of]


def compiled(source: str, launches: tuple[Launch, ...]) -> ctypes.CDLL:
    """The text with the model of a block, as a library with a function run_NAME(blocks, arguments) for each kernel."""
    compiler = next((c for c in map(shutil.which, COMPILERS) if c), None)
    if compiler is None:
        raise Refusal("kernels in CUDA C++ run on the CPU through a C++ compiler, and there is none",
                      hint=f"install one of {', '.join(COMPILERS)}")
    runs = []
    for x in launches:
        names = [f"a{n}" for n in range(len(x.args))]
        declared = "".join(f", {_C.get(a.type, 'void *')} {n}" for a, n in zip(x.args, names, strict=True))
        given = ", ".join(n if a.type in _C else f"(decltype(pointer<{k}>({x.function}))){n}"
                          for k, (a, n) in enumerate(zip(x.args, names, strict=True)))
        runs.append(f'extern "C" int run_{x.function}(long long blocks{declared}) {{\n'
                    f"  return simulate(blocks, {x.block}, [&] {{ {x.function}({given}); }});\n}}\n")
    text = "\n".join([MODEL, source, _POINTER, *runs])
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder, "kernel.cpp"), Path(folder, f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so")
        file.write_text(text)
        done = subprocess.run([compiler, *FLAGS, str(file), "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr[:200])
            raise Refusal("the kernel's text does not compile for the CPU", first.partition("error")[2])
        return ctypes.CDLL(str(library))


_POINTER = r'''
template <int N, class First, class... Rest> struct Argument : Argument<N - 1, Rest...> {};
template <class First, class... Rest> struct Argument<0, First, Rest...> { using type = First; };
template <int N, class... Args> typename Argument<N, Args...>::type pointer(void (*)(Args...));
'''
