#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC optimize("schedule-insns", "sched-pressure")  // interleaves independent work: Step in noise_kernels.h
#pragma GCC diagnostic ignored "-Wuninitialized"          // in GCC's own AVX-512 headers
#define LSF_LANES 16
#define LSF_ISA kernels_avx512
#define LSF_ISA_NAME "avx512"
#include "isa_table.h"
