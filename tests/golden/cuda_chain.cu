extern "C" __global__ void __launch_bounds__(128, 1) lone_g0_to_lone_g1(const float *__restrict__ X_ptr, int X_s0, float *Y_ptr, int Y_s0, int N, float *__restrict__ Z_ptr) {
  {   // lone_g0
    const int thread = threadIdx.x;
#pragma unroll 1
    for (long long next = blockIdx.x * 128LL + thread; next < 1LL * N * 3; next += 128LL * gridDim.x) {
      long long task = next;
      const int d = digit(task, 3);
      const int n = (int)task;
      float X_t[1];
      float Y_t[1];
      X_t[0] = *(X_ptr + (long long)(n) * X_s0 + (long long)(d));
      Y_t[0] = (X_t[0] * 2.0f);
      *(Y_ptr + (long long)(n) * Y_s0 + (long long)(d)) = Y_t[0];
    }
  }
  all_meet();
  {   // lone_g1
    char *rooms = nullptr;
    int turn = 0;
    const int thread = threadIdx.x;
#pragma unroll 1
    for (long long next = blockIdx.x; thread < 32 && next < 1LL * N; next += 1LL * gridDim.x) {
      long long task = next;
      const int n = (int)task;
      const int d_at = (thread & 3);
      float Y_t[1];
      float Z_t[1];
      Y_t[0] = (d_at < 3 ? *(Y_ptr + (long long)(n) * Y_s0 + (long long)(d_at)) : 0.0f);
      {
        float total = 0.0f;
        total = total + (d_at < 3 ? Y_t[0] : 0.0f);
        Z_t[0] = total;
      }
      combine<Sum, 3, 1>(Z_t, rooms, turn);
      if ((thread & 31) == 0) *(Z_ptr + (long long)(n)) = Z_t[0];
    }
  }
}
