// What the operators of the lrt family have around their products: the noisy epilogue, its gradient, and elementwise
// passes. ops/lrt.py has the contract.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "gemm.h"
#include "tiles.h"

namespace losssurf {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// dtype of the products' operands
at::ScalarType operand_dtype(const Tensor& x);

// ---- parameterizations -------------------------------------------------------------------------------------------

enum class Kind { layer, neuron, weight, additive, variance };

Kind kind_of(std::string_view name);
bool alpha_in_output_space(Kind kind);
// exp(log_alpha) [O] or [1] in fp32 or fp64; undefined for the kinds whose alpha is inside sigma^2.
Tensor output_alpha(Kind kind, const Tensor& scale);
// sigma^2 as an operand of the product, laid out like scale or weight; without alpha for "layer" and "neuron".
Tensor variance_operand(Kind kind, const Tensor& weight, const Tensor& scale, at::ScalarType dtype, Scratch& scratch);

// ---- elementwise passes ------------------------------------------------------------------------------------------
// Over dense tensors whose elements lie in the same order.

void run_map(Map op, std::initializer_list<Tensor> in, std::initializer_list<Tensor> out);
// x^2 as an operand of the product
Tensor square(const Tensor& x, at::ScalarType dtype, Scratch& scratch);
// base + 2 x product, in `dtype`; takes base's memory where it can.
Tensor add_product(const Tensor& base, const Tensor& x, const Tensor& product, at::ScalarType dtype);
// product exp(log_sigma2) in log_sigma2's dtype; takes product's memory where it can.
Tensor product_exp(const Tensor& product, const Tensor& log_sigma2);
// Gradients of the "weight" parameterization to weight and log_alpha, in the memory of base and dsigma2.
std::tuple<Tensor, Tensor> weight_grads(const Tensor& base, const Tensor& weight, const Tensor& dsigma2,
                                        const Tensor& log_alpha);

// ---- noise -------------------------------------------------------------------------------------------------------
// Outputs are seen as matrices: [M, O], [N O, positions] or [N positions, O] by their layout.

// mean + bias + sqrt(alpha var + 1e-16) noise into `out`, which may be the mean itself: each element is read before it
// is written. mean, bias and alpha may be undefined.
void sample_forward(const LrtNoise& noise, const Tensor& mean, const Tensor& bias, const Tensor& alpha,
                    const Tensor& var, const Tensor& out);

struct VarianceGradient {
  Tensor var;    // before alpha
  Tensor bias;   // sums of grad per channel [O]; undefined where not asked for
  Tensor alpha;  // partial sums [.., O] of grad_var var; likewise
};

// grad_var in `dtype`, in memory of `scratch` where that is given
VarianceGradient sample_backward(const LrtNoise& noise, const Tensor& grad, const Tensor& alpha, const Tensor& var,
                                 at::ScalarType dtype, bool want_bias, bool want_alpha, Scratch* scratch);
// d log_alpha of "layer" or "neuron" in its dtype
Tensor alpha_gradient(Kind kind, const Tensor& partial_sums, const Tensor& scale);

}  // namespace losssurf
