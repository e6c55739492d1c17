// What averaging.cu offers to averaging_glue.cpp: plain pointers, so that nvcc needs no torch and g++ no CUDA kernels.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "float_type.h"

constexpr int kMaxAverages = 4;  // of one value in one pass

// A value and its averages, numel elements each in one order; null where there is no average.
struct LerpTensors {
  int64_t numel;
  const void* value;
  void* averages[kMaxAverages];
};

// averages[k] <- lerp(averages[k], value, weights[k]) for `count` weights and for every tensor. One launch takes a
// thousand tensors of one average, or 580 of several. An error of the launch is left to cudaGetLastError.
extern "C" void losssurf_lerp(FloatType average, FloatType value, const LerpTensors* tensors, int64_t num_tensors,
                              const double* weights, int count, cudaStream_t stream);
