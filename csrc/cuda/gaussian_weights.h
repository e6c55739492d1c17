// What gaussian_weights.cu offers to gaussian_weights_glue.cpp: plain pointers, so that nvcc needs no torch and g++ no
// CUDA kernels.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../divergence.h"
#include "float_type.h"

// A tensor of weights, no element of which is fp64.
struct GaussianTensors {
  int64_t numel;
  const void *weight, *scale;  // weight is null where the means are 0
  int64_t run;                 // weights that an element of scale covers
  int64_t row;                 // of the noise
  FloatType type, scale_type;  // of weight, its draw and its gradient, and of scale
  bool multiplicative;
  float kl_times;  // how often the KL of an element is taken, 0 for never
};

// `out` is null where there is nothing to draw: scale has the elements that a tensor's weights share, for their KL.
struct GaussianDraw : GaussianTensors {
  void* out;
};

// Gradients that are null are not wanted.
struct GaussianGradient : GaussianTensors {
  const void* grad;  // of the draw
  FloatType grad_type;
  void *grad_weight, *grad_scale;
  double* sums;  // gaussian_sums(numel, run) places where run > 1 and grad_scale is wanted
};
constexpr int64_t kGaussianChunk = 2048;
inline int64_t gaussian_sums(int64_t numel, int64_t run) {
  return (numel + kGaussianChunk - 1) / kGaussianChunk + numel / run;
}

struct GaussianOptions {
  const int64_t* seed;  // on the device
  uint32_t sample;
  bool has_kl;
  KL kl;
  Prior prior;
};

// Draws every tensor. One launch takes 453 tensors. Where has_kl, also adds to the kGaussianPartials partial sums of the
// KL, which are 0 at first.
constexpr int kGaussianPartials = 8192;
extern "C" void losssurf_gaussian_weights(const GaussianDraw* tensors, int64_t num_tensors,
                                          const GaussianOptions* options, double* partials, cudaStream_t stream);

// Writes the gradients; grad_kl is on the device. One launch takes 313 tensors, and another one those with sums.
extern "C" void losssurf_gaussian_weights_backward(const GaussianGradient* tensors, int64_t num_tensors,
                                                   const GaussianOptions* options, const float* grad_kl,
                                                   cudaStream_t stream);
