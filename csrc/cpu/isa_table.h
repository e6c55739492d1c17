// The kernels of one instruction set, compiled for the target that the including file has set.
#pragma GCC optimize("schedule-insns", "sched-pressure")
#include "noise_kernels.h"

extern const Kernels LSF_ISA;
const Kernels LSF_ISA = {
    LSF_ISA_NAME,
    philox_normal,
    philox_words,
};
