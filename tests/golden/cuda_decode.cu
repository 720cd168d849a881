extern "C" __global__ void __launch_bounds__(256, 1) decode_g0(const unsigned short *__restrict__ Q_ptr, int Q_s0, int Q_s1, const unsigned short *__restrict__ K_ptr, int K_s0, int K_s1, const unsigned short *__restrict__ V_ptr, int V_s0, int V_s1, unsigned short *__restrict__ O_ptr, int O_s0, int O_s1, int J, int M) {
  SHARED(rooms, 16384);
  int turn = 0;
  SHARED_BYTES(staged);
  int slot = 0;
  const int thread = threadIdx.x;
  long long task = blockIdx.x;
  const int j = (int)task;
  const int f_at = (thread & 7) * 8;
  const int e_at = (thread & 7) * 8;
  const int m0_at = (thread >> 3 & 31);
  float RGM[4];
  float RD[4];
  float RN[64];
  unsigned Q_t[32];
  unsigned K_t[32];
  float S[16];
  float RGM_old[4];
  float FGM[4];
  unsigned V_t[32];
  #pragma unroll
  for (int g_r = 0; g_r < 4; ++g_r) {
    RGM[g_r] = (-INFINITE32);
  }
  #pragma unroll
  for (int g_r = 0; g_r < 4; ++g_r) {
    RD[g_r] = 0.0f;
  }
  #pragma unroll
  for (int g_r = 0; g_r < 4; ++g_r) {
    #pragma unroll
    for (int f_r = 0; f_r < 16; ++f_r) {
      RN[g_r * 16 + f_r] = 0.0f;
    }
  }
  #pragma unroll
  for (int g_r = 0; g_r < 4; ++g_r) {
    #pragma unroll
    for (int e_r = 0; e_r < 16; e_r += 8) {
      fetch<4>(Q_t + (g_r * 16 + e_r) / 2, Q_ptr + (long long)(j) * Q_s0 + (long long)(g_r) * Q_s1 + (long long)((e_at + e_r / 8 * 64 + e_r % 8)));
    }
  }
  const int end1 = ((M + 128 - 1) / 128);
  const int end2 = least(most(((((M + 1) + 128 - 1) / 128) - 1), 0), end1);
  #pragma unroll
  for (int i = 0; i < 4; ++i) RD[i] = thread & 248 ? 0.0f : RD[i];
  #pragma unroll
  for (int i = 0; i < 64; ++i) RN[i] = thread & 248 ? 0.0f : RN[i];
  #pragma unroll 1
  for (int step = 0; step < 1; ++step) {
    if (const int later = 0 + step; later < end2) {
      const int m1 = later;
      char *place = staged + step * 65536;
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int e_r = 0; e_r < 16; e_r += 8) {
          ask<16, 256>(place + (((m0_r) * 2 + e_r / 8) * 256 + thread) * 16, K_ptr + (long long)(j) * K_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * K_s1 + (long long)((e_at + e_r / 8 * 64 + e_r % 8)));
        }
      }
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int f_r = 0; f_r < 16; f_r += 8) {
          ask<16, 256>(place + 32768 + (((m0_r) * 2 + f_r / 8) * 256 + thread) * 16, V_ptr + (long long)(j) * V_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * V_s1 + (long long)((f_at + f_r / 8 * 64 + f_r % 8)));
        }
      }
    }
    asked();
  }
  slot = 0;
  #pragma unroll 1
  for (int m1 = 0; m1 < end2; ++m1) {
    if (const int later = m1 + 1; later < end2) {
      const int m1 = later;
      char *place = staged + (slot == 0 ? 1 : slot - 1) * 65536;
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int e_r = 0; e_r < 16; e_r += 8) {
          ask<16, 256>(place + (((m0_r) * 2 + e_r / 8) * 256 + thread) * 16, K_ptr + (long long)(j) * K_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * K_s1 + (long long)((e_at + e_r / 8 * 64 + e_r % 8)));
        }
      }
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int f_r = 0; f_r < 16; f_r += 8) {
          ask<16, 256>(place + 32768 + (((m0_r) * 2 + f_r / 8) * 256 + thread) * 16, V_ptr + (long long)(j) * V_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * V_s1 + (long long)((f_at + f_r / 8 * 64 + f_r % 8)));
        }
      }
    }
    asked();
    come<1>();
    const char *room = staged + slot * 65536;
    slot = slot == 1 ? 0 : slot + 1;
    #pragma unroll
    for (int m0_r = 0; m0_r < 4; ++m0_r) {
      #pragma unroll
      for (int e_r = 0; e_r < 16; e_r += 8) {
        take<4, 256>(K_t + (m0_r * 16 + e_r) / 2, room + (((m0_r) * 2 + e_r / 8) * 256 + thread) * 16);
      }
    }
    #pragma unroll
    for (int m0_r = 0; m0_r < 4; ++m0_r) {
      #pragma unroll
      for (int f_r = 0; f_r < 16; f_r += 8) {
        take<4, 256>(V_t + (m0_r * 16 + f_r) / 2, room + 32768 + (((m0_r) * 2 + f_r / 8) * 256 + thread) * 16);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        float total = 0.0f;
        #pragma unroll
        for (int e_r = 0; e_r < 16; ++e_r) {
          total = total + (bf16_of(Q_t[(g_r * 16 + e_r) / 2], (g_r * 16 + e_r) % 2) * bf16_of(K_t[(m0_r * 16 + e_r) / 2], (m0_r * 16 + e_r) % 2));
        }
        S[g_r * 4 + m0_r] = total;
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        S[g_r * 4 + m0_r] = (S[g_r * 4 + m0_r] * 0.125f);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      RGM_old[g_r] = RGM[g_r];
    }
    combine<Sum, 7, 8>(S, rooms, turn);
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        RGM[g_r] = highest(RGM[g_r], S[g_r * 4 + m0_r]);
      }
    }
    combine<Max, 248, 8>(RGM, rooms, turn);
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      FGM[g_r] = ((RGM[g_r] == (-INFINITE32)) ? 0.0f : RGM[g_r]);
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        S[g_r * 4 + m0_r] = (exp((S[g_r * 4 + m0_r] - FGM[g_r])));
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      RGM_old[g_r] = (exp((RGM_old[g_r] - FGM[g_r])));
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      RD[g_r] = (RD[g_r] * RGM_old[g_r]);
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        RD[g_r] = RD[g_r] + S[g_r * 4 + m0_r];
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int f_r = 0; f_r < 16; ++f_r) {
        RN[g_r * 16 + f_r] = (RN[g_r * 16 + f_r] * RGM_old[g_r]);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int f_r = 0; f_r < 16; ++f_r) {
        #pragma unroll
        for (int m0_r = 0; m0_r < 4; ++m0_r) {
          RN[g_r * 16 + f_r] = RN[g_r * 16 + f_r] + (S[g_r * 4 + m0_r] * bf16_of(V_t[(m0_r * 16 + f_r) / 2], (m0_r * 16 + f_r) % 2));
        }
      }
    }
  }
  #pragma unroll 1
  for (int step = 0; step < 1; ++step) {
    if (const int later = end2 + step; later < end1) {
      const int m1 = later;
      char *place = staged + step * 65536;
      const int m0_n = (least((M - (m1 * 128)), 128));
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int e_r = 0; e_r < 16; e_r += 8) {
          ask<16, 256>(place + (((m0_r) * 2 + e_r / 8) * 256 + thread) * 16, K_ptr + (long long)(j) * K_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * K_s1 + (long long)((e_at + e_r / 8 * 64 + e_r % 8)), (m0_at + m0_r * 32) < m0_n);
        }
      }
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int f_r = 0; f_r < 16; f_r += 8) {
          ask<16, 256>(place + 32768 + (((m0_r) * 2 + f_r / 8) * 256 + thread) * 16, V_ptr + (long long)(j) * V_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * V_s1 + (long long)((f_at + f_r / 8 * 64 + f_r % 8)), (m0_at + m0_r * 32) < m0_n);
        }
      }
    }
    asked();
  }
  slot = 0;
  #pragma unroll 1
  for (int m1 = end2; m1 < end1; ++m1) {
    if (const int later = m1 + 1; later < end1) {
      const int m1 = later;
      char *place = staged + (slot == 0 ? 1 : slot - 1) * 65536;
      const int m0_n = (least((M - (m1 * 128)), 128));
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int e_r = 0; e_r < 16; e_r += 8) {
          ask<16, 256>(place + (((m0_r) * 2 + e_r / 8) * 256 + thread) * 16, K_ptr + (long long)(j) * K_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * K_s1 + (long long)((e_at + e_r / 8 * 64 + e_r % 8)), (m0_at + m0_r * 32) < m0_n);
        }
      }
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        #pragma unroll
        for (int f_r = 0; f_r < 16; f_r += 8) {
          ask<16, 256>(place + 32768 + (((m0_r) * 2 + f_r / 8) * 256 + thread) * 16, V_ptr + (long long)(j) * V_s0 + (long long)(((m1 * 128) + (m0_at + m0_r * 32))) * V_s1 + (long long)((f_at + f_r / 8 * 64 + f_r % 8)), (m0_at + m0_r * 32) < m0_n);
        }
      }
    }
    asked();
    come<1>();
    const char *room = staged + slot * 65536;
    slot = slot == 1 ? 0 : slot + 1;
    const int m0_n = (least((M - (m1 * 128)), 128));
    #pragma unroll
    for (int m0_r = 0; m0_r < 4; ++m0_r) {
      #pragma unroll
      for (int e_r = 0; e_r < 16; e_r += 8) {
        take<4, 256>(K_t + (m0_r * 16 + e_r) / 2, room + (((m0_r) * 2 + e_r / 8) * 256 + thread) * 16);
      }
    }
    #pragma unroll
    for (int m0_r = 0; m0_r < 4; ++m0_r) {
      #pragma unroll
      for (int f_r = 0; f_r < 16; f_r += 8) {
        take<4, 256>(V_t + (m0_r * 16 + f_r) / 2, room + 32768 + (((m0_r) * 2 + f_r / 8) * 256 + thread) * 16);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        float total = 0.0f;
        #pragma unroll
        for (int e_r = 0; e_r < 16; ++e_r) {
          total = total + (bf16_of(Q_t[(g_r * 16 + e_r) / 2], (g_r * 16 + e_r) % 2) * bf16_of(K_t[(m0_r * 16 + e_r) / 2], (m0_r * 16 + e_r) % 2));
        }
        S[g_r * 4 + m0_r] = total;
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        S[g_r * 4 + m0_r] = (S[g_r * 4 + m0_r] * 0.125f);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      RGM_old[g_r] = RGM[g_r];
    }
    combine<Sum, 7, 8>(S, rooms, turn);
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        RGM[g_r] = highest(RGM[g_r], ((m0_at + m0_r * 32) < m0_n ? S[g_r * 4 + m0_r] : (-INFINITE32)));
      }
    }
    combine<Max, 248, 8>(RGM, rooms, turn);
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      FGM[g_r] = ((RGM[g_r] == (-INFINITE32)) ? 0.0f : RGM[g_r]);
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        S[g_r * 4 + m0_r] = (exp((S[g_r * 4 + m0_r] - FGM[g_r])));
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      RGM_old[g_r] = (exp((RGM_old[g_r] - FGM[g_r])));
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      RD[g_r] = (RD[g_r] * RGM_old[g_r]);
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int m0_r = 0; m0_r < 4; ++m0_r) {
        RD[g_r] = RD[g_r] + ((m0_at + m0_r * 32) < m0_n ? S[g_r * 4 + m0_r] : 0.0f);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int f_r = 0; f_r < 16; ++f_r) {
        RN[g_r * 16 + f_r] = (RN[g_r * 16 + f_r] * RGM_old[g_r]);
      }
    }
    #pragma unroll
    for (int g_r = 0; g_r < 4; ++g_r) {
      #pragma unroll
      for (int f_r = 0; f_r < 16; ++f_r) {
        #pragma unroll
        for (int m0_r = 0; m0_r < 4; ++m0_r) {
          RN[g_r * 16 + f_r] = RN[g_r * 16 + f_r] + ((m0_at + m0_r * 32) < m0_n ? (S[g_r * 4 + m0_r] * bf16_of(V_t[(m0_r * 16 + f_r) / 2], (m0_r * 16 + f_r) % 2)) : 0.0f);
        }
      }
    }
  }
  combine<Sum, 248, 8>(RN, rooms, turn);
  combine<Sum, 248, 8>(RD, rooms, turn);
  #pragma unroll
  for (int g_r = 0; g_r < 4; ++g_r) {
    #pragma unroll
    for (int f_r = 0; f_r < 16; ++f_r) {
      RN[g_r * 16 + f_r] = (RN[g_r * 16 + f_r] / RD[g_r]);
    }
  }
  #pragma unroll
  for (int g_r = 0; g_r < 4; ++g_r) {
    #pragma unroll
    for (int f_r = 0; f_r < 16; f_r += 8) {
      unsigned short raw[8];
      #pragma unroll
      for (int i = 0; i < 8; ++i) raw[i] = to_bf16(RN[g_r * 16 + (f_r + i)]);
      if ((thread & 248) == 0) put<8>(O_ptr + (long long)(j) * O_s0 + (long long)(g_r) * O_s1 + (long long)((f_at + f_r / 8 * 64 + f_r % 8)), raw);
    }
  }
}
