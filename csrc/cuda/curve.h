// What curve.cu offers to curve_glue.cpp: plain pointers, so that nvcc needs no torch and g++ no CUDA kernels.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "float_type.h"

// The tensors of one weight, numel elements each in one order. Forward: the weight, and `others` are its K bends.
// Backward: its gradient, and `others` are the K gradients of its bends, null where none is wanted; where those of the
// coefficients are wanted, the K bends follow.
struct CurveTensors {
  int64_t numel;
  void* weight;
  void* const* others;
};

// K coefficients on the device, fp64 beside fp64 tensors, else fp32: nothing waits for them, and a CUDA graph reads
// them anew.
struct CurveCoefficients {
  const void* values;
  int count;
};

// The largest K for which there is a kernel: the bends' addresses travel in its arguments.
extern "C" int losssurf_curve_max_bends();

// Writes every weight. One launch takes 582 tensors of up to four bends, 258 of nine.
extern "C" void losssurf_curve_weights(FloatType type, const CurveTensors* tensors, int64_t num_tensors,
                                       CurveCoefficients coefficients, cudaStream_t stream);

// Writes the gradients of bends. Where `partials` is not null, also adds to its K rows of kCurvePartials, which are 0
// at first. Tensors of every dtype add to the same; losssurf_curve_sum then makes the coefficients' gradients of them,
// in fp32 or fp64.
constexpr int kCurvePartials = 2048;
extern "C" void losssurf_curve_weights_backward(FloatType type, const CurveTensors* tensors, int64_t num_tensors,
                                                CurveCoefficients coefficients, double* partials, cudaStream_t stream);
extern "C" void losssurf_curve_sum(const double* partials, void* grad_coefficients, FloatType type, int count,
                                   cudaStream_t stream);
