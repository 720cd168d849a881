extern "C" __global__ void __launch_bounds__(256, 1) bag_g0(const long long *__restrict__ I_ptr, int I_s0, const float *__restrict__ W_ptr, int W_s0, float *__restrict__ O_ptr, int O_s0, int T, int L, int N, int D) {
  SHARED(rooms, 16384);
  int turn = 0;
  SHARED_BYTES(staged);
  int slot = 0;
  const int thread = threadIdx.x;
  long long task = blockIdx.x;
  const int d1 = digit(task, ((D + 128 - 1) / 128));
  const int t = (int)task;
  const int d0_at = (thread & 7) * 4;
  const int l0_at = (thread >> 3 & 31);
  const int d0_n = (least((D - (d1 * 128)), 128));
  float O_run[16];
  float W_t[64];
  #pragma unroll
  for (int d0_r = 0; d0_r < 16; ++d0_r) {
    O_run[d0_r] = 0.0f;
  }
  const int end1 = ((L + 128 - 1) / 128);
  const int end2 = least(most(((((L + 1) + 128 - 1) / 128) - 1), 0), end1);
  #pragma unroll
  for (int i = 0; i < 16; ++i) O_run[i] = thread & 248 ? 0.0f : O_run[i];
  #pragma unroll 1
  for (int step = 0; step < 1; ++step) {
    if (const int later = 0 + step; later < end2) {
      const int l1 = later;
      char *place = staged + step * 65536;
      #pragma unroll
      for (int l0_r = 0; l0_r < 4; ++l0_r) {
        #pragma unroll
        for (int d0_r = 0; d0_r < 16; d0_r += 4) {
          ask<16, 256>(place + (((l0_r) * 4 + d0_r / 4) * 256 + thread) * 16, W_ptr + (long long)(((int)(most((least(*(I_ptr + (long long)(t) * I_s0 + (long long)(((l1 * 128) + (l0_at + l0_r * 32)))), (long long)(N - 1))), 0LL)))) * W_s0 + (long long)(((d1 * 128) + (d0_at + d0_r / 4 * 32 + d0_r % 4))), (d0_at + d0_r / 4 * 32 + d0_r % 4) < d0_n);
        }
      }
    }
    asked();
  }
  slot = 0;
  #pragma unroll 1
  for (int l1 = 0; l1 < end2; ++l1) {
    if (const int later = l1 + 1; later < end2) {
      const int l1 = later;
      char *place = staged + (slot == 0 ? 1 : slot - 1) * 65536;
      #pragma unroll
      for (int l0_r = 0; l0_r < 4; ++l0_r) {
        #pragma unroll
        for (int d0_r = 0; d0_r < 16; d0_r += 4) {
          ask<16, 256>(place + (((l0_r) * 4 + d0_r / 4) * 256 + thread) * 16, W_ptr + (long long)(((int)(most((least(*(I_ptr + (long long)(t) * I_s0 + (long long)(((l1 * 128) + (l0_at + l0_r * 32)))), (long long)(N - 1))), 0LL)))) * W_s0 + (long long)(((d1 * 128) + (d0_at + d0_r / 4 * 32 + d0_r % 4))), (d0_at + d0_r / 4 * 32 + d0_r % 4) < d0_n);
        }
      }
    }
    asked();
    come<1>();
    const char *room = staged + slot * 65536;
    slot = slot == 1 ? 0 : slot + 1;
    #pragma unroll
    for (int l0_r = 0; l0_r < 4; ++l0_r) {
      #pragma unroll
      for (int d0_r = 0; d0_r < 16; d0_r += 4) {
        take<4, 256>(W_t + l0_r * 16 + d0_r, room + (((l0_r) * 4 + d0_r / 4) * 256 + thread) * 16);
      }
    }
    #pragma unroll
    for (int d0_r = 0; d0_r < 16; ++d0_r) {
      #pragma unroll
      for (int l0_r = 0; l0_r < 4; ++l0_r) {
        O_run[d0_r] = O_run[d0_r] + W_t[l0_r * 16 + d0_r];
      }
    }
  }
  #pragma unroll 1
  for (int step = 0; step < 1; ++step) {
    if (const int later = end2 + step; later < end1) {
      const int l1 = later;
      char *place = staged + step * 65536;
      const int l0_n = (least((L - (l1 * 128)), 128));
      #pragma unroll
      for (int l0_r = 0; l0_r < 4; ++l0_r) {
        #pragma unroll
        for (int d0_r = 0; d0_r < 16; d0_r += 4) {
          ask<16, 256>(place + (((l0_r) * 4 + d0_r / 4) * 256 + thread) * 16, W_ptr + (long long)(((int)(most((least(((l0_at + l0_r * 32) < l0_n ? *(I_ptr + (long long)(t) * I_s0 + (long long)(((l1 * 128) + (l0_at + l0_r * 32)))) : 0), (long long)(N - 1))), 0LL)))) * W_s0 + (long long)(((d1 * 128) + (d0_at + d0_r / 4 * 32 + d0_r % 4))), (l0_at + l0_r * 32) < l0_n && (d0_at + d0_r / 4 * 32 + d0_r % 4) < d0_n);
        }
      }
    }
    asked();
  }
  slot = 0;
  #pragma unroll 1
  for (int l1 = end2; l1 < end1; ++l1) {
    if (const int later = l1 + 1; later < end1) {
      const int l1 = later;
      char *place = staged + (slot == 0 ? 1 : slot - 1) * 65536;
      const int l0_n = (least((L - (l1 * 128)), 128));
      #pragma unroll
      for (int l0_r = 0; l0_r < 4; ++l0_r) {
        #pragma unroll
        for (int d0_r = 0; d0_r < 16; d0_r += 4) {
          ask<16, 256>(place + (((l0_r) * 4 + d0_r / 4) * 256 + thread) * 16, W_ptr + (long long)(((int)(most((least(((l0_at + l0_r * 32) < l0_n ? *(I_ptr + (long long)(t) * I_s0 + (long long)(((l1 * 128) + (l0_at + l0_r * 32)))) : 0), (long long)(N - 1))), 0LL)))) * W_s0 + (long long)(((d1 * 128) + (d0_at + d0_r / 4 * 32 + d0_r % 4))), (l0_at + l0_r * 32) < l0_n && (d0_at + d0_r / 4 * 32 + d0_r % 4) < d0_n);
        }
      }
    }
    asked();
    come<1>();
    const char *room = staged + slot * 65536;
    slot = slot == 1 ? 0 : slot + 1;
    const int l0_n = (least((L - (l1 * 128)), 128));
    #pragma unroll
    for (int l0_r = 0; l0_r < 4; ++l0_r) {
      #pragma unroll
      for (int d0_r = 0; d0_r < 16; d0_r += 4) {
        take<4, 256>(W_t + l0_r * 16 + d0_r, room + (((l0_r) * 4 + d0_r / 4) * 256 + thread) * 16);
      }
    }
    #pragma unroll
    for (int d0_r = 0; d0_r < 16; ++d0_r) {
      #pragma unroll
      for (int l0_r = 0; l0_r < 4; ++l0_r) {
        O_run[d0_r] = O_run[d0_r] + ((l0_at + l0_r * 32) < l0_n ? W_t[l0_r * 16 + d0_r] : 0.0f);
      }
    }
  }
  combine<Sum, 248, 8>(O_run, rooms, turn);
  #pragma unroll
  for (int d0_r = 0; d0_r < 16; d0_r += 4) {
    float raw[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = O_run[(d0_r + i)];
    if ((thread & 248) == 0) put<4>(O_ptr + (long long)(t) * O_s0 + (long long)(((d1 * 128) + (d0_at + d0_r / 4 * 32 + d0_r % 4))), raw, d0_n - (d0_at + d0_r / 4 * 32 + d0_r % 4));
  }
}
