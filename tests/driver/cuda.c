// A driver without a device, in place of libcuda.so.1: it says what it was asked, one line a call, and does nothing.
// DRIVER_LOG: where the lines go; DRIVER_CAPABILITY: 90; DRIVER_SIZES: bytes of each parameter, as the cubins tell them,
// "8,8,4;8,4" for two launches in turn.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAY(...) do { FILE *log = fopen(getenv("DRIVER_LOG"), "a"); fprintf(log, __VA_ARGS__); fclose(log); } while (0)
static void *context = (void *)0x100;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *d, int ordinal) { *d = ordinal; return 0; }
int cuDeviceGetAttribute(int *v, int which, int device) {
  int capability = atoi(getenv("DRIVER_CAPABILITY"));
  *v = which == 75 ? capability / 10 : which == 76 ? capability % 10 : which == 16 ? 132 : 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int device) { *c = context; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxGetCurrent(void **c) { *c = context; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "REFUSED"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "refused"; return 0; }
int cuLibraryLoadData(void **l, const void *code, void *o, void *ov, unsigned no, void *p, void *pv, unsigned np) {
  SAY("load %02x%.3s\n", *(unsigned char *)code, (const char *)code + 1);
  *l = (void *)0x200;
  return 0;
}
int cuLibraryUnload(void *l) { return 0; }
int cuLibraryGetKernel(void **k, void *l, const char *name) { SAY("function %s\n", name); *k = (void *)0x300; return 0; }
int cuKernelSetAttribute(int which, int value, void *k, int device) {
  SAY("attribute %d %d %p %d\n", which, value, k, device);
  return value > 232448 ? 1 : 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int block, size_t shared) {
  SAY("room %p %d %zu\n", f, block, shared);
  *n = 1;
  return 0;
}
static int launch(const char *how, void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *stream, void **args) {
  SAY("%s %p %u,%u,%u %u,%u,%u %u %p ", how, f, x, y, z, bx, by, bz, shared, stream);
  static char *left;
  if (!left) left = strdup(getenv("DRIVER_SIZES"));
  char *rest = strsep(&left, ";");
  for (char *one; (one = strsep(&rest, ",")); ++args)
    for (int n = atoi(one), i = 0; i < n; ++i) SAY("%02x%s", ((unsigned char *)*args)[i], i == n - 1 ? "," : "");
  SAY("\n");
  return 0;
}
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **args, void **extra) {
  return launch("launch", f, x, y, z, bx, by, bz, shared, stream, args);
}
int cuLaunchCooperativeKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void *stream, void **args) {
  return launch("together", f, x, y, z, bx, by, bz, shared, stream, args);
}
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *place, const uint64_t *extents,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  SAY("map %d %p %d %d %d %d", type, place, interleave, swizzle, promotion, fill);
  for (unsigned n = 0; n < rank; ++n)
    SAY(" %lu:%lu:%u:%u", extents[n], n + 1 < rank ? strides[n] : 0, box[n], steps[n]);
  SAY("\n");
  memset(map, 0x5a, 128);
  return 0;
}

// every other function: it is there, it must not be called
static int other(void) { SAY("other\n"); return 999; }
int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status) {
  static void *self;
  char versioned[256];
  if (!self) self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  if (!(*out = dlsym(self, name)) && !(*out = dlsym(self, versioned))) *out = (void *)other;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char *name, void **out, int v, uint64_t f) { return cuGetProcAddress_v2(name, out, v, f, 0); }
