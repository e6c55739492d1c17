// CPU kernels of the lrt family: ops/lrt.py has the contract. Library GEMMs, and one fused pass at each end.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "gemm.h"
#include "tiles.h"

namespace losssurf {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

at::ScalarType operand_dtype(const Tensor& x) { return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type(); }

// ---- elementwise passes ------------------------------------------------------------------------------

// Runs one Map over tensors of equal size. All are contiguous; fp64 is the business of the callers.
void run_map(Map op, std::initializer_list<Tensor> in, std::initializer_list<Tensor> out) {
  const auto kernel = kernels().map;
  at::parallel_for(0, out.begin()->numel(), 16384, [&](int64_t begin, int64_t end) {
    std::array<Array, 4> inputs;
    std::array<Array, 2> outputs;
    std::transform(in.begin(), in.end(), inputs.begin(), [&](const Tensor& t) { return array_of(t, begin); });
    std::transform(out.begin(), out.end(), outputs.begin(), [&](const Tensor& t) { return array_of(t, begin); });
    kernel(op, end - begin, inputs.data(), outputs.data());
  });
}

// x^2 as GEMM operand
Tensor square(const Tensor& x, at::ScalarType dtype, Scratch& scratch) {
  if (x.scalar_type() == at::kDouble) return x * x;
  Tensor out = scratch.empty(x.sizes(), x.options().dtype(dtype));
  run_map(Map::square, {x}, {out});
  return out;
}

// A result's memory: `spent`, which nobody reads afterwards, if it has the dtype. Fresh pages cost more than passes.
Tensor empty_or(const Tensor& spent, at::ScalarType dtype) {
  return spent.scalar_type() == dtype ? spent : at::empty(spent.sizes(), spent.options().dtype(dtype));
}

// base + 2 x product, in `dtype`; takes base's memory where it can.
Tensor add_product(const Tensor& base, const Tensor& x, const Tensor& product, at::ScalarType dtype) {
  if (x.scalar_type() == at::kDouble) return base + 2 * x * product;
  Tensor out = empty_or(base, dtype);
  run_map(Map::add_product, {base, x, product}, {out});
  return out;
}

// product exp(log_sigma2) in log_sigma2's dtype; takes product's memory where it can.
Tensor product_exp(const Tensor& product, const Tensor& log_sigma2) {
  if (product.scalar_type() == at::kDouble) return product * log_sigma2.exp();
  Tensor out = empty_or(product, log_sigma2.scalar_type());
  run_map(Map::product_exp, {product, log_sigma2}, {out});
  return out;
}

// Gradients of the "weight" parameterization to weight and log_alpha, in the memory of base and dsigma2.
std::tuple<Tensor, Tensor> weight_grads(const Tensor& base, const Tensor& weight, const Tensor& dsigma2,
                                        const Tensor& log_alpha) {
  if (base.scalar_type() == at::kDouble) {
    const Tensor scaled = log_alpha.exp() * weight * dsigma2;
    return {base + 2 * scaled, scaled * weight};
  }
  Tensor grad_weight = empty_or(base, weight.scalar_type());
  Tensor grad_log_alpha = empty_or(dsigma2, log_alpha.scalar_type());
  run_map(Map::weight_grads, {base, weight, dsigma2, log_alpha}, {grad_weight, grad_log_alpha});
  return {grad_weight, grad_log_alpha};
}

// ---- the layer ---------------------------------------------------------------------------------------

enum class Kind { layer, neuron, weight, additive, variance };

Kind kind_of(std::string_view name) {
  constexpr std::array<std::string_view, 5> names = {"layer", "neuron", "weight", "additive", "variance"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), "lrt_linear: unknown parameterization '", name, "'");
  return static_cast<Kind>(found - names.begin());
}

bool alpha_in_output_space(Kind kind) { return kind == Kind::layer || kind == Kind::neuron; }

// sigma^2 [O, I] as GEMM operand; without alpha for "layer" and "neuron".
Tensor variance_operand(Kind kind, const Tensor& weight, const Tensor& scale, at::ScalarType dtype, Scratch& scratch) {
  if (alpha_in_output_space(kind)) return square(weight, dtype, scratch);
  if (scale.scalar_type() == at::kDouble) return kind == Kind::weight ? scale.exp() * weight * weight : scale.exp();
  Tensor out = scratch.empty(scale.sizes(), scale.options().dtype(dtype));
  if (kind == Kind::weight) run_map(Map::exp_square, {scale, weight}, {out});
  else run_map(Map::exp, {scale}, {out});
  return out;
}

// What the kernels' pointers rely on; ops/lrt.py has the checks that explain.
void check_shapes(Kind kind, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& bias) {
  const Tensor& matrix = kind == Kind::variance ? scale : weight;
  TORCH_CHECK_VALUE(x.dim() == 2 && matrix.dim() == 2 && x.size(1) == matrix.size(1),
                    "lrt_linear: x must be [M, I] and its parameters [O, I], got ", x.sizes(), " and ", matrix.sizes());
  const int64_t outputs = matrix.size(0);
  const int64_t scales = kind == Kind::layer ? 1 : kind == Kind::neuron ? outputs : matrix.numel();
  TORCH_CHECK_VALUE(scale.numel() == scales, "lrt_linear: scale must have ", scales, " elements, got ", scale.sizes());
  TORCH_CHECK_VALUE(!bias.defined() || bias.numel() == outputs, "lrt_linear: bias must be [", outputs, "], got ",
                    bias.sizes());
}

// exp(log_alpha) [O] or [1] in fp32 or fp64; undefined for the kinds whose alpha is inside sigma^2.
Tensor output_alpha(Kind kind, const Tensor& scale) {
  return alpha_in_output_space(kind) ? scale.to(wide_dtype(scale)).exp() : Tensor();
}

Alpha alpha_of(const Tensor& alpha) {
  if (!alpha.defined()) return {nullptr, 0};
  return {alpha.const_data_ptr<float>(), alpha.numel() == 1 ? 0 : 1};
}

// mean + bias + sqrt(alpha var + 1e-16) noise into `out`, which may be the mean itself: each element is read
// before it is written. mean and bias may be undefined.
void sample_forward(NoiseStream stream, const Tensor& mean, const Tensor& bias, const Tensor& alpha, const Tensor& var,
                    const Tensor& out) {
  const int64_t rows = var.size(0), cols = var.size(1);
  if (var.scalar_type() == at::kDouble) {
    const Tensor v = alpha.defined() ? var * alpha : var;
    Tensor y = (v.clamp_min(0) + 1e-16).sqrt() * draw_noise(stream, rows, cols, at::kDouble);
    if (mean.defined()) y += mean;
    if (bias.defined()) y += bias;
    out.copy_(y);
    return;
  }
  const Matrix m = mean.defined() ? matrix_of(mean, cols) : Matrix{nullptr, cols, DType::f32};
  const Matrix v = matrix_of(var, cols), y = matrix_of(out, cols);
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  const auto kernel = kernels().lrt_sample;
  for_tiles(rows, cols, [&](Tile tile) { kernel(stream, tile, m, b, alpha_of(alpha), v, y); });
}

struct VarianceGradient {
  Tensor var;          // [M, O], before alpha
  Tensor bias;         // column sums [O] of grad; undefined where not asked for
  Tensor alpha;        // partial column sums [slabs, O] of grad_var var; likewise
};

VarianceGradient sample_backward(NoiseStream stream, const Tensor& grad, const Tensor& alpha, const Tensor& var,
                                 at::ScalarType dtype, bool want_bias, bool want_alpha, Scratch* scratch) {
  const int64_t rows = var.size(0), cols = var.size(1);
  VarianceGradient result;
  if (var.scalar_type() == at::kDouble) {
    const Tensor v = alpha.defined() ? var * alpha : var;
    Tensor dv = grad * draw_noise(stream, rows, cols, at::kDouble) * 0.5 / (v.clamp_min(0) + 1e-16).sqrt();
    if (alpha.defined()) dv = dv * alpha;
    result.var = at::where(v < 0, at::zeros({}, dv.options()), dv);
    if (want_bias) result.bias = grad.sum(0);
    if (want_alpha) result.alpha = result.var * var;
    return result;
  }
  // Column sums are taken slab by slab of rows and then added in order: the same bits for any number of threads.
  constexpr int64_t kSlabRows = 32, kStripCols = 512;
  const int64_t slabs = (rows + kSlabRows - 1) / kSlabRows, strips = (cols + kStripCols - 1) / kStripCols;
  const auto options = var.options().dtype(at::kFloat);
  const Tensor bias_sums = want_bias ? at::zeros({slabs, cols}, options) : Tensor();
  const Tensor alpha_sums = want_alpha ? at::zeros({slabs, cols}, options) : Tensor();
  result.var = scratch ? scratch->empty(var.sizes(), var.options().dtype(dtype))
                       : at::empty(var.sizes(), var.options().dtype(dtype));
  const Matrix g = matrix_of(grad, cols), v = matrix_of(var, cols), out = matrix_of(result.var, cols);
  const auto kernel = kernels().lrt_sample_backward;
  at::parallel_for(0, slabs * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slab = i / strips, col = i % strips * kStripCols, width = std::min(kStripCols, cols - col);
      const auto sums = [&](const Tensor& t) { return t.defined() ? t.data_ptr<float>() + slab * cols + col : nullptr; };
      const int64_t tile_rows = kTile / width, end_row = std::min(rows, (slab + 1) * kSlabRows);
      for (int64_t row = slab * kSlabRows; row < end_row; row += tile_rows) {
        const Tile tile{row, std::min(tile_rows, end_row - row), col, width};
        kernel(stream, tile, g, alpha_of(alpha), v, out, sums(bias_sums), sums(alpha_sums));
      }
    }
  });
  if (want_bias) result.bias = bias_sums.sum(0);
  if (want_alpha) result.alpha = alpha_sums;
  return result;
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

std::tuple<Tensor, Tensor> lrt_linear_cpu(const Tensor& x, const MaybeTensor& maybe_weight, const Tensor& scale_in,
                                          const MaybeTensor& maybe_bias, const Tensor& seed,
                                          std::string_view parameterization, int64_t row_offset, int64_t col_offset,
                                          int64_t sample) {
  const KernelScope scope;
  const Kind kind = kind_of(parameterization);
  const auto operand = operand_dtype(x);
  Scratch scratch;
  const Tensor a = scratch.cast(x, operand), scale = scale_in.contiguous();
  const Tensor weight = kind == Kind::variance ? Tensor() : maybe_weight->contiguous();
  const Tensor bias = maybe_bias ? maybe_bias->to(wide_dtype(x)).contiguous() : Tensor();
  check_shapes(kind, x, weight, scale, bias);
  const Tensor var = gemm(square(a, operand, scratch), variance_operand(kind, weight, scale, operand, scratch).t());
  const Tensor mean = weight.defined() ? gemm(a, scratch.cast(weight, operand).t()) : Tensor();
  const bool in_place = mean.defined() && mean.scalar_type() == x.scalar_type();
  const Tensor y = in_place ? mean : at::empty(var.sizes(), x.options());
  const NoiseStream stream = noise_stream(seed, row_offset, col_offset, sample);
  sample_forward(stream, mean, bias, output_alpha(kind, scale), var, y);
  return {y, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrt_linear_backward_cpu(
    const Tensor& grad_in, const Tensor& x, const MaybeTensor& maybe_weight, const Tensor& scale_in, bool has_bias,
    const Tensor& var, const Tensor& seed, std::string_view parameterization, std::array<bool, 4> needed,
    int64_t row_offset, int64_t col_offset, int64_t sample) {
  const KernelScope scope;
  const Kind kind = kind_of(parameterization);
  const auto operand = operand_dtype(x);
  const auto [need_x, need_weight, need_scale, need_bias] = needed;
  const bool outer_alpha = alpha_in_output_space(kind);
  Scratch scratch;
  const Tensor a = scratch.cast(x, operand), scale = scale_in.contiguous();
  const Tensor weight = kind == Kind::variance ? Tensor() : maybe_weight->contiguous();
  const Tensor grad = grad_in.contiguous();
  check_shapes(kind, x, weight, scale, Tensor());
  TORCH_CHECK_VALUE(grad.sizes() == var.sizes(), "lrt_linear_backward: grad must have var's shape ", var.sizes(),
                    ", got ", grad.sizes());
  const NoiseStream stream = noise_stream(seed, row_offset, col_offset, sample);
  const VarianceGradient dvar = sample_backward(stream, grad, output_alpha(kind, scale), var.contiguous(), operand,
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
  if (need_scale && outer_alpha)
    grad_scale = (kind == Kind::layer ? dvar.alpha.sum().reshape({1}) : dvar.alpha.sum(0)).to(scale.scalar_type());
  else if (need_scale && kind != Kind::weight)
    grad_scale = blocks ? blocked.log_sigma2 : product_exp(dsigma2, scale);
  const auto keep = [&](bool needed, const Tensor& t) { return needed ? t : at::empty({0}, x.options()); };
  return {keep(need_x, grad_x), keep(need_weight, grad_weight), keep(need_scale, grad_scale),
          keep(need_bias && has_bias, dvar.bias)};
}

// ---- the epilogue alone --------------------------------------------------------------------------------

Tensor lrt_sample_cpu(const Tensor& mean, const Tensor& var, const Tensor& seed, int64_t row_offset,
                      int64_t col_offset, int64_t sample) {
  TORCH_CHECK_VALUE(mean.dim() == 2 && mean.sizes() == var.sizes(), "lrt_sample: mean and var must be [M, O], got ",
                    mean.sizes(), " and ", var.sizes());
  const Tensor y = at::empty(mean.sizes(), mean.options());
  const NoiseStream stream = noise_stream(seed, row_offset, col_offset, sample);
  sample_forward(stream, mean.contiguous(), Tensor(), Tensor(), var.contiguous(), y);
  return y;
}

Tensor lrt_sample_backward_cpu(const Tensor& grad, const Tensor& var, const Tensor& seed, int64_t row_offset,
                               int64_t col_offset, int64_t sample) {
  TORCH_CHECK_VALUE(var.dim() == 2 && grad.sizes() == var.sizes(), "lrt_sample_backward: grad and var must be [M, O], got ",
                    grad.sizes(), " and ", var.sizes());
  const NoiseStream stream = noise_stream(seed, row_offset, col_offset, sample);
  return sample_backward(stream, grad.contiguous(), Tensor(), var.contiguous(), var.scalar_type(), false, false, nullptr).var;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("lrt_sample", &losssurf::lrt_sample_cpu);
  m.impl("lrt_sample_backward", &losssurf::lrt_sample_backward_cpu);
  m.impl("lrt_linear", &losssurf::lrt_linear_cpu);
  m.impl("lrt_linear_backward", &losssurf::lrt_linear_backward_cpu);
}
