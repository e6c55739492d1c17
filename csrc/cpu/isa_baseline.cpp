// Any x86-64: SSE2, fma by libm. Slow, never different.
#define LSF_LANES 4
#define LSF_ISA kernels_baseline
#define LSF_ISA_NAME "baseline"
#include "isa_table.h"
