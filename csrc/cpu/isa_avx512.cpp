#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LSF_LANES 16
#define LSF_ISA kernels_avx512
#define LSF_ISA_NAME "avx512"
#include "isa_table.h"
