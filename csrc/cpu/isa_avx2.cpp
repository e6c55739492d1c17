#pragma GCC target("avx2,fma,f16c")
#define LSF_LANES 8
#define LSF_ISA kernels_avx2
#define LSF_ISA_NAME "avx2"
#include "isa_table.h"
