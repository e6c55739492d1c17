// One element of the averaging family: ops/averaging.py and ops/swag.py have the contracts.
//
// Templates over F (float, lanes of it, or double), shared by the CPU and CUDA kernels. In fp32 every product that is
// added is an explicit fma, in fp64 none is: built without contraction (-ffp-contract=off, -fmad=false), all backends
// return the same bits.
#pragma once
#include "scalar.h"

namespace {

// torch.lerp from whichever end is nearer. Taken by value: coefficient = weight - 1.
template <class C> struct LerpWeightIn {
  C coefficient;
  bool from_value;
  static LerpWeightIn of(double weight) {
    const bool near = weight > -0.5 && weight < 0.5;
    return {(C)(near ? weight : weight - 1), !near};
  }
};
typedef LerpWeightIn<float> LerpWeight;
template <class F> LSF_INLINE F lerp_element(F average, F value, LerpWeightIn<Constant<F>> w) {
  return fused_mul_add(constant<F>(w.coefficient), value - average, w.from_value ? value : average);
}

// Welford's update by the value number n, counted from 0; weight = 1 / (n + 1). The first value is copied.
template <class F> struct Moments {
  F mean, m2, deviation;
};
template <class F> LSF_INLINE Moments<F> welford_element(F mean, F m2, F value, Constant<F> weight, bool first) {
  if (first) return {value, constant<F>(0.0f), value - value};
  const F delta = value - mean;
  const F next = fused_mul_add(delta, constant<F>(weight), mean);
  const F deviation = value - next;
  return {next, fused_mul_add(delta, deviation, m2), deviation};
}

// mean + (std z + low_rank) with std = sqrt(m2 variance_scale); low_rank = sum_j coefficient_j deviation_j by fma in
// the order of j, starting from 0.
template <class F> LSF_INLINE F swag_element(F mean, F m2, F z, F low_rank, Constant<F> variance_scale) {
  return mean + fused_mul_add(sqrt_rn(m2 * constant<F>(variance_scale)), z, low_rank);
}

}  // namespace
