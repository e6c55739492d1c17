// CPU kernels of the lrt family: ops/lrt.py has the contract. Library GEMMs, and one fused pass at each end.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "lrt_passes.h"

namespace losssurf {
namespace {

// ---- the layer ---------------------------------------------------------------------------------------

// The mean weights; undefined for "variance".
Tensor weights_of(const char* op, Kind kind, const MaybeTensor& weight) {
  if (kind == Kind::variance) return Tensor();
  TORCH_CHECK_VALUE(weight, op, ": weight is missing for another parameterization than \"variance\"");
  return weight->contiguous();
}

// What the kernels' pointers rely on; ops/lrt.py has the checks that explain.
void check_shapes(const char* op, Kind kind, const Tensor& x, const Tensor& weight, const Tensor& scale,
                  const Tensor& bias) {
  const Tensor& matrix = kind == Kind::variance ? scale : weight;
  TORCH_CHECK_VALUE(x.dim() == 2 && matrix.dim() == 2 && x.size(1) == matrix.size(1), op,
                    ": x must be [M, I] and its parameters [O, I], got ", x.sizes(), " and ", matrix.sizes());
  const int64_t outputs = matrix.size(0);
  const int64_t scales = kind == Kind::layer ? 1 : kind == Kind::neuron ? outputs : matrix.numel();
  TORCH_CHECK_VALUE(scale.numel() == scales, op, ": scale must have ", scales, " elements, got ", scale.sizes());
  TORCH_CHECK_VALUE(!bias.defined() || bias.numel() == outputs, op, ": bias must be [", outputs, "], got ",
                    bias.sizes());
}

// What the variance stream's gradient gives where sigma^2 = exp(log_sigma2): grad_var sigma^2 [M, I] and the gradient
// to log_sigma2 [O, I], each undefined where not asked for.
struct LogVarianceGradient {
  Tensor through_var, log_sigma2;
};

// At few rows the passes over [O, I] cost as much as the products. So sigma^2 is made, multiplied and multiplied in
// block by block of outputs, while the block is in the L2 cache, and never written to memory.
bool in_blocks(Kind kind, const Tensor& x, const Tensor& scale) {
  constexpr int64_t kFewRows = 256;
  return (kind == Kind::additive || kind == Kind::variance) && x.scalar_type() == at::kFloat && x.size(0) <= kFewRows &&
         x.numel() > 0 && scale.size(0) > 0 && !on_amd();  // where gemm would take oneDNN, which cannot accumulate
}

LogVarianceGradient log_variance_gradient(const Tensor& x, const Tensor& scale, const Tensor& grad_var, bool need_x,
                                          bool need_scale, Scratch& scratch) {
  constexpr int64_t kBlock = 1 << 18;  // elements: 1 MiB
  const int64_t outputs = scale.size(0), step = std::min(outputs, std::max<int64_t>(16, kBlock / scale.size(1)));
  const Tensor squares = need_scale ? square(x, at::kFloat, scratch) : Tensor();
  const Tensor block = scratch.empty({step, scale.size(1)}, scale.options());
  LogVarianceGradient result;
  if (need_x) result.through_var = scratch.empty(x.sizes(), x.options());
  if (need_scale) result.log_sigma2 = at::empty(scale.sizes(), scale.options());
  for (int64_t first = 0; first < outputs; first += step) {
    const int64_t count = std::min(step, outputs - first);
    const Tensor sigma2 = block.narrow(0, 0, count), dv = grad_var.narrow(1, first, count);
    run_map(Map::exp, {scale.narrow(0, first, count)}, {sigma2});
    if (need_x && first == 0) at::mm_out(result.through_var, dv, sigma2);
    else if (need_x) result.through_var.addmm_(dv, sigma2);
    if (!need_scale) continue;
    Tensor part = result.log_sigma2.narrow(0, first, count);
    at::mm_out(part, dv.t(), squares).mul_(sigma2);
  }
  return result;
}

std::tuple<Tensor, Tensor> lrt_variance_operand_cpu(const MaybeTensor& maybe_weight, const Tensor& scale_in,
                                                    std::string_view parameterization, at::ScalarType dtype) {
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(dtype) && !c10::isFloat8Type(dtype),
                              "lrt_variance_operand: float8 operands are not multiplied on the CPU");
  constexpr auto kOp = "lrt_variance_operand";
  const KernelScope scope;
  const Kind kind = kind_of(parameterization);
  const Tensor scale = scale_in.contiguous(), weight = weights_of(kOp, kind, maybe_weight);
  const Tensor& matrix = kind == Kind::variance ? scale : weight;
  check_shapes(kOp, kind, matrix, weight, scale, Tensor());
  Scratch scratch;
  const Tensor no_row_scale = at::empty({0}, scale.options().dtype(at::kFloat));
  return {variance_operand(kind, weight, scale, dtype, scratch).clone(), no_row_scale};
}

std::tuple<Tensor, Tensor> lrt_linear_cpu(const Tensor& x, const MaybeTensor& maybe_weight, const Tensor& scale_in,
                                          const MaybeTensor& maybe_bias, const Tensor& seed,
                                          std::string_view parameterization, int64_t row_offset, int64_t col_offset,
                                          int64_t sample, const MaybeTensor& maybe_sigma2,
                                          const MaybeTensor& row_scale) {
  constexpr auto kOp = "lrt_linear";
  const KernelScope scope;
  const Kind kind = kind_of(parameterization);
  const auto operand = operand_dtype(x);
  Scratch scratch;
  const Tensor a = scratch.cast(x, operand), scale = scale_in.contiguous();
  const Tensor weight = weights_of(kOp, kind, maybe_weight);
  const Tensor bias = maybe_bias ? maybe_bias->to(wide_dtype(x)).contiguous() : Tensor();
  check_shapes(kOp, kind, x, weight, scale, bias);
  TORCH_CHECK_TYPE(!row_scale, "lrt_linear: float8 operands are not multiplied on the CPU");
  const Tensor sigma2 =
      maybe_sigma2 ? maybe_sigma2->contiguous() : variance_operand(kind, weight, scale, operand, scratch);
  TORCH_CHECK_VALUE(sigma2.sizes() == (weight.defined() ? weight : scale).sizes() && sigma2.scalar_type() == operand,
                    "lrt_linear: sigma2 must have the weights' shape in ", operand, ", got ", sigma2.sizes(), " in ",
                    sigma2.scalar_type());
  const Tensor var = gemm(square(a, operand, scratch), sigma2.t());
  const Tensor mean = weight.defined() ? gemm(a, scratch.cast(weight, operand).t()) : Tensor();
  const bool in_place = mean.defined() && mean.scalar_type() == x.scalar_type();
  const Tensor y = in_place ? mean : at::empty(var.sizes(), x.options());
  const LrtNoise noise{noise_stream(seed, row_offset, col_offset, sample)};
  sample_forward(noise, mean, bias, output_alpha(kind, scale), var, y);
  return {y, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrt_linear_backward_cpu(
    const Tensor& grad_in, const Tensor& x, const MaybeTensor& maybe_weight, const Tensor& scale_in, bool has_bias,
    const Tensor& var, const Tensor& seed, std::string_view parameterization, std::array<bool, 4> needed,
    int64_t row_offset, int64_t col_offset, int64_t sample) {
  constexpr auto kOp = "lrt_linear_backward";
  const KernelScope scope;
  const Kind kind = kind_of(parameterization);
  const auto operand = operand_dtype(x);
  const auto [need_x, need_weight, need_scale, need_bias] = needed;
  const bool outer_alpha = alpha_in_output_space(kind);
  Scratch scratch;
  const Tensor a = scratch.cast(x, operand), scale = scale_in.contiguous();
  const Tensor weight = weights_of(kOp, kind, maybe_weight);
  const Tensor grad = grad_in.contiguous();
  check_shapes(kOp, kind, x, weight, scale, Tensor());
  TORCH_CHECK_VALUE(grad.sizes() == var.sizes(), "lrt_linear_backward: grad must have var's shape ", var.sizes(),
                    ", got ", grad.sizes());
  const LrtNoise noise{noise_stream(seed, row_offset, col_offset, sample)};
  const VarianceGradient dvar = sample_backward(noise, grad, output_alpha(kind, scale), var.contiguous(), operand,
                                                need_bias && has_bias, need_scale && outer_alpha, &scratch);
  const Tensor g = scratch.cast(grad, operand);
  Tensor grad_x, grad_weight, grad_scale;
  // A GEMM whose result is rounded to another dtype afterwards needs no memory of its own.
  const auto draft = [&](const Tensor& like) { return like.scalar_type() == operand ? nullptr : &scratch; };
  const bool blocks = in_blocks(kind, x, scale);
  LogVarianceGradient blocked;
  if (blocks) blocked = log_variance_gradient(a, scale, dvar.var, need_x, need_scale, scratch);
  if (need_x) {
    const Tensor through_var =
        blocks ? blocked.through_var
               : gemm(dvar.var, variance_operand(kind, weight, scale, operand, scratch), &scratch);
    const Tensor through_mean =
        weight.defined() ? gemm(g, scratch.cast(weight, operand), draft(x)) : at::zeros_like(through_var);
    grad_x = add_product(through_mean, a, through_var, x.scalar_type());
  }
  const bool need_sigma2 = (need_weight && kind != Kind::additive) || (need_scale && !outer_alpha && !blocks);
  const Tensor dsigma2 =
      need_sigma2 ? gemm(dvar.var.t(), square(a, operand, scratch), outer_alpha ? &scratch : draft(scale)) : Tensor();
  if (need_weight || (need_scale && kind == Kind::weight)) {
    grad_weight = gemm(g.t(), a, draft(weight));
    if (kind == Kind::weight) std::tie(grad_weight, grad_scale) = weight_grads(grad_weight, weight, dsigma2, scale);
    else if (outer_alpha) grad_weight = add_product(grad_weight, weight, dsigma2, weight.scalar_type());
    else grad_weight = grad_weight.to(weight.scalar_type());
  }
  if (need_scale && outer_alpha) grad_scale = alpha_gradient(kind, dvar.alpha, scale);
  else if (need_scale && kind != Kind::weight)
    grad_scale = blocks ? blocked.log_sigma2 : product_exp(dsigma2, scale);
  const auto keep = [&](bool needed, const Tensor& t) { return needed ? t : at::empty({0}, x.options()); };
  return {keep(need_x, grad_x), keep(need_weight, grad_weight), keep(need_scale, grad_scale),
          keep(need_bias && has_bias, dvar.bias)};
}

// ---- the epilogue alone --------------------------------------------------------------------------------

// Rows whose channels are not all there are the planes of a convolution's output.
LrtNoise matrix_noise(const Tensor& var, const Tensor& seed, int64_t row_offset, int64_t col_offset, int64_t sample,
                      int64_t channels, int64_t channels_total) {
  const NoiseStream stream = noise_stream(seed, row_offset, col_offset, sample);
  if (channels == 0) return {stream};
  TORCH_CHECK_VALUE(channels > 0 && var.size(0) % channels == 0 && channels_total >= channels,
                    "lrt_sample: channels must divide ", var.size(0), " rows and be at most channels_total, got ",
                    channels, " and ", channels_total);
  return {stream, LrtLayout::channels_first, channels, channels_total, var.size(1)};
}

Tensor lrt_sample_cpu(const Tensor& mean, const Tensor& var, const Tensor& seed, int64_t row_offset,
                      int64_t col_offset, int64_t sample, int64_t channels, int64_t channels_total) {
  TORCH_CHECK_VALUE(mean.dim() == 2 && mean.sizes() == var.sizes(), "lrt_sample: mean and var must be [M, O], got ",
                    mean.sizes(), " and ", var.sizes());
  const Tensor y = at::empty(mean.sizes(), mean.options());
  const LrtNoise noise = matrix_noise(var, seed, row_offset, col_offset, sample, channels, channels_total);
  sample_forward(noise, mean.contiguous(), Tensor(), Tensor(), var.contiguous(), y);
  return y;
}

Tensor lrt_sample_backward_cpu(const Tensor& grad, const Tensor& var, const Tensor& seed, int64_t row_offset,
                               int64_t col_offset, int64_t sample, int64_t channels, int64_t channels_total) {
  TORCH_CHECK_VALUE(var.dim() == 2 && grad.sizes() == var.sizes(), "lrt_sample_backward: grad and var must be [M, O], got ",
                    grad.sizes(), " and ", var.sizes());
  const LrtNoise noise = matrix_noise(var, seed, row_offset, col_offset, sample, channels, channels_total);
  return sample_backward(noise, grad.contiguous(), Tensor(), var.contiguous(), var.scalar_type(), false, false, nullptr).var;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("lrt_sample", &losssurf::lrt_sample_cpu);
  m.impl("lrt_sample_backward", &losssurf::lrt_sample_backward_cpu);
  m.impl("lrt_variance_operand", &losssurf::lrt_variance_operand_cpu);
  m.impl("lrt_linear", &losssurf::lrt_linear_cpu);
  m.impl("lrt_linear_backward", &losssurf::lrt_linear_backward_cpu);
}
