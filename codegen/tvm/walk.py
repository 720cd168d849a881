"""The steps of a plan in a row, as C that every library of a kernel carries: `memcomp_walk`.

Its arguments are the address of a program, the first step, the last, and the tensors of a call.  A program's records
are laid out by `memcomp.artifact.walk`, and mean the same there.  Kernels are called as tvm-ffi calls them, with
arguments that are there already, so what one raises is what the walk raises.  A step that finds an index which names no
element stops the walk: its number is the result, and whoever called says what is wrong.  None: all is done.
"""

TEXT = r"""
#include <stdint.h>
#include <string.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef struct { int32_t kind; uint32_t zero; union { int64_t number; void* place; } is; } Value; /* TVMFFIAny */
typedef struct {
  char* data; int32_t device, id, ndim; uint8_t code, bits; uint16_t lanes;
  int64_t *shape, *strides; uint64_t offset;
} Tensor;                                                                                         /* DLTensor */
typedef int (*Call)(void*, const Value*, int32_t, Value*);
typedef struct { int64_t what; Call call; void* self; const Value* args; int64_t count; } Step;
typedef struct { Tensor* tensor; int64_t given, offset; } Hole; /* memory that is another at every call */
typedef struct { const Step* steps; const Hole* holes; int64_t count; } Program;
enum { KERNEL, CHECK, COPY, PUT, TENSOR_POINTER = 7, HEADER = 24 };

static int64_t number(const Tensor* x, const char* at) {
  int64_t i64; int32_t i32; int16_t i16;
  switch (x->bits) {
    case 64: memcpy(&i64, at, 8); return i64;
    case 32: memcpy(&i32, at, 4); return i32;
    case 16: memcpy(&i16, at, 2); return i16;
    default: return x->code ? (int64_t)*(const uint8_t*)at : (int64_t)*(const int8_t*)at;
  }
}

/* Is every element in low .. size - 1, or the one that names nothing? */
static int within(const Tensor* x, int d, const char* at, int64_t low, int64_t size,
                  const int64_t* ignored) {
  int64_t k, step;
  if (d == x->ndim) {
    k = number(x, at);
    return (k >= low && k < size) || (ignored && k == *ignored);
  }
  step = x->strides[d] * (x->bits / 8);
  for (k = 0; k < x->shape[d]; ++k)
    if (!within(x, d + 1, at + k * step, low, size, ignored)) return 0;
  return 1;
}

static int rows(const Tensor* x, int first) {
  int64_t step = 1;
  int d;
  for (d = x->ndim - 1; d >= first; --d) {
    if (x->shape[d] != 1 && x->strides[d] != step) return 0;
    step *= x->shape[d];
  }
  return 1;
}

/* The dims from `d` on, with the extents of `from`. */
static void copy(const Tensor* to, const Tensor* from, int d, char* out, const char* in) {
  int64_t k, bytes = from->bits / 8;
  int e;
  if (d == from->ndim || (rows(to, d) && rows(from, d))) {
    for (e = d; e < from->ndim; ++e) bytes *= from->shape[e];
    memcpy(out, in, (size_t)bytes);
    return;
  }
  for (k = 0; k < from->shape[d]; ++k)
    copy(to, from, d + 1, out + k * to->strides[d] * bytes, in + k * from->strides[d] * bytes);
}

static void put(const Tensor* to, const Tensor* from, const Tensor* index, int dim, int d, char* out, const char* in) {
  int64_t k, i, bytes = from->bits / 8;
  for (k = 0; k < from->shape[d]; ++k, in += from->strides[d] * bytes) {
    i = k;
    if (d == dim) {
      i = number(index, index->data + (index->ndim ? k * index->strides[0] * (index->bits / 8) : 0));
      i += i < 0 ? to->shape[d] : 0;
    }
    if (d < dim) put(to, from, index, dim, d + 1, out + i * to->strides[d] * bytes, in);
    else copy(to, from, d + 1, out + i * to->strides[d] * bytes, in);
  }
}

static int done(const Step* step) {
  const Value* a = step->args;
  const Tensor *x = (const Tensor*)a[0].is.place, *y, *z;
  if (step->what == CHECK)
    return within(x, 0, x->data, a[1].is.number, a[2].is.number, step->count > 3 ? &a[3].is.number : 0);
  y = (const Tensor*)a[1].is.place;
  if (step->what == COPY) {
    copy(y, x, 0, y->data, x->data);
    return 1;
  }
  z = (const Tensor*)a[2].is.place; /* x: places, y: what is put there, z: where */
  if (!within(x, 0, x->data, a[4].is.number, z->shape[a[3].is.number], 0)) return 0;
  put(z, y, x, (int)a[3].is.number, 0, z->data, y->data);
  return 1;
}

int __tvm_ffi_memcomp_walk(void* self, const Value* args, int32_t count, Value* result) {
  const Program* program = (const Program*)(intptr_t)args[0].is.number;
  int64_t k;
  int code;
  (void)self;
  for (k = 0; k < (count > 3 ? program->count : 0); ++k) {
    const Hole* h = &program->holes[k];
    const Value* v = &args[3 + h->given];
    const Tensor* t = (const Tensor*)((const char*)v->is.place + (v->kind == TENSOR_POINTER ? 0 : HEADER));
    h->tensor->data = t->data + t->offset + h->offset;
  }
  for (k = args[1].is.number; k < args[2].is.number; ++k) {
    const Step* step = &program->steps[k];
    if (step->what == KERNEL) {
      Value none;
      memset(&none, 0, sizeof none);
      code = step->call(step->self, step->args, (int32_t)step->count, &none);
      if (code) return code;
    } else if (!done(step)) {
      result->kind = 1;
      result->is.number = k;
      return 0;
    }
  }
  return 0;
}
#ifdef __cplusplus
}
#endif
"""
