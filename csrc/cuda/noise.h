// What noise.cu offers to noise_glue.cpp: plain pointers, so that nvcc needs no torch and g++ no CUDA kernels.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "float_type.h"

// Noise of rows row_offset + [0, rows) and columns col_offset + [0, cols) into out, row after row without gaps.
// The seed is read on the device. An error of the launch is left to cudaGetLastError.
extern "C" void losssurf_philox_normal(const int64_t* seed, void* out, FloatType dtype, int64_t rows, int64_t cols,
                                       int64_t row_offset, int64_t col_offset, uint32_t sample, cudaStream_t stream);
