// What swag.cu offers to swag_glue.cpp: plain pointers, so that nvcc needs no torch and g++ no CUDA kernels.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "float_type.h"

// The moments of one parameter, the row of its ring buffer that is written (or null), and the model's weight.
struct CollectTensors {
  int64_t numel;
  void *mean, *m2, *deviation;
  const void* value;
};

// Takes value number n, counted from 0, into the moments (fp32 or fp64) of every tensor. One launch takes 670 tensors.
extern "C" void losssurf_swag_collect(FloatType mean, FloatType deviation, FloatType value,
                                      const CollectTensors* tensors, int64_t num_tensors, int64_t n,
                                      cudaStream_t stream);

// What swag_collect left of one parameter, and its samples [samples, numel]; where it lies in the noise is
// ops/swag.py's Place.
struct SampleTensors {
  int64_t numel;
  const void *mean, *m2, *deviations;
  void* out;
  int64_t row, offset, run, stride;
};

struct SampleOptions {
  const int64_t* seed;  // on the device
  int rank;             // columns that the low-rank part adds up, 0 for none
  bool block;
  uint32_t first_sample;
  int64_t samples, num_params;
  double variance_scale, coefficient;  // scale / n, sqrt(scale / (rank - 1))
};

// The largest rank for which there is a kernel; `mean` is fp32 or fp64.
extern "C" int64_t losssurf_swag_max_rank(FloatType mean);
// Draws the samples of every tensor. One launch takes 400 tensors and as many samples as have their coefficients in
// 16 KB of shared memory: 200 at rank 20 in fp32.
extern "C" void losssurf_swag_sample(FloatType mean, FloatType deviations, FloatType out, const SampleTensors* tensors,
                                     int64_t num_tensors, const SampleOptions* options, cudaStream_t stream);
