// The kernels of one instruction set, compiled for the target that the including file has set.
#include "averaging_kernels.h"
#include "block_float_kernels.h"
#include "curve_kernels.h"
#include "curve_linear_kernels.h"
#include "gaussian_weights_kernels.h"
#include "kl_kernels.h"
#include "lrt_kernels.h"
#include "noise_kernels.h"
#include "swag_kernels.h"

extern const Kernels LSF_ISA;
const Kernels LSF_ISA = {
    LSF_ISA_NAME,
    philox_normal,
    philox_words,
    lrt_sample,
    lrt_sample_backward,
    map,
    kl_sum,
    kl_scale,
    lerp,
    swag_collect,
    swag_sample,
    curve_sum,
    curve_product,
    curve_dots,
    curve_add,
    small_product,
    max_magnitude,
    block_float_quantize,
    block_float_dequantize,
    gaussian_weights,
    gaussian_weights_backward,
};
