"""What every emitted CUDA text begins with.  No header: NVRTC, nvcc and the host's model (`host`) know these words."""

HEAD = r'''
#define INFINITE32 __int_as_float(0x7f800000)
#define INFINITE64 __longlong_as_double(0x7ff0000000000000LL)
#define NOT_A_NUMBER32 __int_as_float(0x7fc00000)
#define NOT_A_NUMBER64 __longlong_as_double(0x7ff8000000000000LL)
#define INLINE __device__ __forceinline__

#ifndef ON_HOST
#define SHARED(name, bytes) __shared__ __align__(16) char name[bytes]
#define SHARED_BYTES(name) extern __shared__ __align__(16) char name[]
// the warps of a block that compute have come, which may not be all of its warps
template <int WARPS> __device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory");
}
template <int N> __device__ __forceinline__ void copy_later(char *to, const char *from, bool live) {
  const unsigned at = __cvta_generic_to_shared(to);
  const unsigned long long source = __cvta_generic_to_global(from);
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(source), "r"(live ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(source), "n"(N), "r"(live ? N : 0)
                 : "memory");
}
__device__ __forceinline__ void asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// all that was asked for has come, but for the last `waiting` times
template <int waiting> __device__ __forceinline__ void come() {
  asm volatile("cp.async.wait_group %0;" ::"n"(waiting) : "memory");
}
#endif

// neighbours in memory, read and written at once
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Block { T at[N]; };

// As many bytes from memory.  Volatile, so that loads which stand before a barrier are under way before it: the
// compiler would sink what is constant to where it is used.
template <class T> INLINE T loaded(const void *from, bool live) {
#ifndef ON_HOST
  unsigned w[4];
  const unsigned long long at = __cvta_generic_to_global(from);
  if constexpr (sizeof(T) == 16)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
                 "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(at), "r"((int)live));
  else if constexpr (sizeof(T) == 8)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; "
                 "@p ld.global.v2.u32 {%0, %1}, [%2]; }" : "=r"(w[0]), "=r"(w[1]) : "l"(at), "r"((int)live));
  else if constexpr (sizeof(T) == 4)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.u32 %0, [%1]; }"
                 : "=r"(w[0]) : "l"(at), "r"((int)live));
  else
    return live ? *(const T *)from : T{};
  T x;
  memcpy(&x, w, sizeof x);
  return x;
#else
  return live ? *(const T *)from : T{};
#endif
}

// N numbers from memory, as they are; zeros where they do not count: not at all, or not 16 bytes of them, which may be
// another row's or nobody's
template <int N, class T> INLINE void fetch(T *to, const void *from, bool live = true, int left = N) {
  constexpr int most = 16 / sizeof(T), few = N < most ? N : most;
#pragma unroll
  for (int k = 0; k < N; k += few) {
    const Block<T, few> x = loaded<Block<T, few>>((const Block<T, few> *)from + k / few, live && k < left);
#pragma unroll
    for (int i = 0; i < few; ++i) to[k + i] = x.at[i];
  }
}

// N numbers to memory, or those before the end
template <int N, class T> INLINE void put(void *to, const T *from, int count = N) {
  constexpr int most = 16 / sizeof(T), few = N < most ? N : most;
#pragma unroll
  for (int k = 0; k < N; k += few) {
    Block<T, few> x;
#pragma unroll
    for (int i = 0; i < few; ++i) x.at[i] = from[k + i];
    if (k + few <= count) {
      ((Block<T, few> *)to)[k / few] = x;
      continue;
    }
#pragma unroll
    for (int i = 0; i < few; ++i)
      if (k + i < count) ((T *)to)[k + i] = x.at[i];
  }
}

// What a thread has asked for lies in shared memory, in places of its own, N bytes of it THREADS times `unit` apart: no
// other thread waits for it.  Bytes that do not count are zeros.
template <int N, int THREADS> INLINE void ask(char *to, const void *from, bool live = true, int left = N) {
  constexpr int unit = N < 16 ? N : 16;
#pragma unroll
  for (int k = 0; k < N / unit; ++k)
    copy_later<unit>(to + k * THREADS * unit, (const char *)from + k * unit, live && k * unit < left);
}
template <int N, int THREADS, class T> INLINE void take(T *to, const char *from) {
  constexpr int most = 16 / sizeof(T), few = N < most ? N : most;
#pragma unroll
  for (int k = 0; k < N; k += few) {
    const Block<T, few> x = *(const Block<T, few> *)(from + k / few * THREADS * sizeof(x));
#pragma unroll
    for (int i = 0; i < few; ++i) to[k + i] = x.at[i];
  }
}
// What is less than 4 bytes is asked for with the word around it, and taken out of that.
INLINE void ask_around(char *to, const void *from, bool live = true) {
  copy_later<4>(to, (const char *)((unsigned long long)from & ~3ULL), live);
}
template <int N, class T> INLINE void take_around(T *to, const char *at, const void *from) {
  const unsigned word = *(const unsigned *)at >> ((unsigned long long)from & 3) * 8;
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = (T)(word >> i * 8 * sizeof(T));
}

// stored formats; of a word the part that is asked for
INLINE float from_bf16(unsigned bits) { return __uint_as_float(bits << 16); }
INLINE float from_f16(unsigned bits) {
#ifndef ON_HOST
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)bits));
  return x;
#else
  return host_from_f16(bits);
#endif
}
INLINE float bf16_of(unsigned word, int k) { return __uint_as_float(k ? word & 0xffff0000u : word << 16); }
INLINE float f16_of(unsigned word, int k) { return from_f16(k ? word >> 16 : word & 0xffffu); }
INLINE int i8_of(unsigned word, int k) { return (signed char)(word >> 8 * k); }
INLINE int u8_of(unsigned word, int k) { return (unsigned char)(word >> 8 * k); }

// operations that nothing is fused with
#ifndef ON_HOST
INLINE float mul_f32(float a, float b) { return __fmul_rn(a, b); }
INLINE float add_f32(float a, float b) { return __fadd_rn(a, b); }
INLINE float sub_f32(float a, float b) { return __fadd_rn(a, -b); }
INLINE float div_f32(float a, float b) { return __fdiv_rn(a, b); }
#else
INLINE float mul_f32(float a, float b) { return a * b; }
INLINE float add_f32(float a, float b) { return a + b; }
INLINE float sub_f32(float a, float b) { return a - b; }
INLINE float div_f32(float a, float b) { return a / b; }
#endif

// nearest, ties to even; a NaN stays one
INLINE unsigned short to_bf16(float x) {
  unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE unsigned short to_f16(float x) {
#ifndef ON_HOST
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  return host_to_f16(x);
#endif
}

// a NaN stays one
INLINE float highest(float a, float b) {
#ifndef ON_HOST
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a != a || a > b ? a : b;
#endif
}
INLINE float lowest(float a, float b) {
#ifndef ON_HOST
  float x;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a != a || a < b ? a : b;
#endif
}
INLINE double highest(double a, double b) { return a != a || a > b ? a : b; }
INLINE double lowest(double a, double b) { return a != a || a < b ? a : b; }
template <class T> INLINE T most(T a, T b) { return a > b ? a : b; }
template <class T> INLINE T least(T a, T b) { return a < b ? a : b; }

// rounds down; the remainder has the sign of b.  A point that does not count may have a 0 here.
template <class T> INLINE T mod(T a, T b) { return b == 0 ? 0 : (a % b + b) % b; }
template <class T> INLINE T floordiv(T a, T b) { return b == 0 ? 0 : (a - mod(a, b)) / b; }
// the last digit of a number to a base, and the number without it
INLINE int digit(long long &number, int base) {
  const long long all = number;
  number = all <= 0x7fffffff ? (int)all / base : all / base;
  return (int)(all - number * base);
}
template <class T> INLINE T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }
template <class T> INLINE T xlogx(T x) { return x == T(0) ? T(0) : x * log(x); }

struct Sum { template <class T> static INLINE T of(T a, T b) { return a + b; } };
struct Prod { template <class T> static INLINE T of(T a, T b) { return a * b; } };
struct Max {
  static INLINE float of(float a, float b) { return highest(a, b); }
  static INLINE double of(double a, double b) { return highest(a, b); }
  static INLINE long long of(long long a, long long b) { return most(a, b); }
};
struct Min {
  static INLINE float of(float a, float b) { return lowest(a, b); }
  static INLINE double of(double a, double b) { return lowest(a, b); }
  static INLINE long long of(long long a, long long b) { return least(a, b); }
};
struct And { static INLINE bool of(bool a, bool b) { return a & b; } };
struct Or { static INLINE bool of(bool a, bool b) { return a | b; } };

template <class T> INLINE T from_lane(T x, int other) { return __shfl_xor_sync(0xffffffffu, x, other); }
INLINE bool from_lane(bool x, int other) { return __shfl_xor_sync(0xffffffffu, (int)x, other); }

// Joins what threads hold that differ in these bits of their numbers; then they hold the same.  What passes between
// warps lies in one of two rooms in turn: who still reads the one has not met the others at the next barrier.
constexpr int AT_ONCE = 4;
template <class Join, int BITS, int WARPS, class T, int N>
INLINE void combine(T (&x)[N], char *rooms, int &turn) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
    if (BITS & bit) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = Join::of(x[i], from_lane(x[i], bit));
    }
  constexpr int across = BITS >> 5;
  if constexpr (across != 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < N; k += AT_ONCE) {
      T *room = (T *)(rooms + turn * (AT_ONCE * WARPS * 32 * 8));
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (k + i < N) room[(i * WARPS + warp) * 32 + lane] = x[k + i];
      meet<WARPS>();
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (k + i < N) {
          x[k + i] = room[(i * WARPS + (warp & ~across)) * 32 + lane];
#pragma unroll
          for (int w = 1; w < WARPS; ++w)
            if ((w & ~across) == 0)
              x[k + i] = Join::of(x[k + i], room[(i * WARPS + (warp & ~across | w)) * 32 + lane]);
        }
    }
  }
}
'''

# names that no name of a program may have in the text
TAKEN = set("""\
alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float for
friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
public register reinterpret_cast return short signed sizeof static static_assert static_cast struct switch template
this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor
xor_eq before Lowest NOWHERE enter power merge Best from_warp
threadIdx blockIdx blockDim gridDim warpSize INLINE Block fetch put Sum Prod Max Min And Or combine from_lane
AT_ONCE SHARED SHARED_BYTES meet all_meet counter arrive look here held ON_HOST INFINITE32 INFINITE64 NOT_A_NUMBER32
NOT_A_NUMBER64 memcpy
copy_later ask ask_around asked come take take_around loaded digit
from_bf16 from_f16 bf16_of f16_of i8_of u8_of to_bf16 to_f16 mul_f32 add_f32 sub_f32 div_f32 highest
lowest most least mod floordiv sigmoid xlogx
abs fabs exp exp2 log log2 sin cos erf tanh expm1 log1p floor rint sqrt pow i main linux unix""".split())
