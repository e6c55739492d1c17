// One element of a curve's weights and of their gradients: ops/curve.py has the contract.
//
// Templates over F (float, lanes of it, or double), shared by the CPU and CUDA kernels; as in averaging_math.h, an fp32
// product that is added is an explicit fma, so all backends return the same bits. A bend of coefficient 0 is left out
// of the sum, whichever it is; with all of them left out the weight is 0.
#pragma once
#include "scalar.h"

namespace {

// The sum's first term, c_j w_j; also the gradient of a bend, c_j g.
template <class F> LSF_INLINE F curve_first(F bend, Constant<F> coefficient) {
  return bend * constant<F>(coefficient);
}

// The sum with the next term: total + c_j w_j.
template <class F> LSF_INLINE F curve_next(F total, F bend, Constant<F> coefficient) {
  return fused_mul_add(bend, constant<F>(coefficient), total);
}

// The gradient of a coefficient with the next element's share: sum + g w_j.
template <class F> LSF_INLINE F curve_dot(F sum, F grad, F bend) { return fused_mul_add(grad, bend, sum); }

}  // namespace
