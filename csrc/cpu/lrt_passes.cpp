#include "lrt_passes.h"

#include <array>

namespace losssurf {

at::ScalarType operand_dtype(const Tensor& x) { return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type(); }

// ---- parameterizations -------------------------------------------------------------------------------------------

Kind kind_of(std::string_view name) {
  constexpr std::array<std::string_view, 5> names = {"layer", "neuron", "weight", "additive", "variance"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), "losssurf_fast: unknown parameterization '", name, "'");
  return static_cast<Kind>(found - names.begin());
}

bool alpha_in_output_space(Kind kind) { return kind == Kind::layer || kind == Kind::neuron; }

Tensor output_alpha(Kind kind, const Tensor& scale) {
  return alpha_in_output_space(kind) ? scale.to(wide_dtype(scale)).exp() : Tensor();
}

Tensor variance_operand(Kind kind, const Tensor& weight, const Tensor& scale, at::ScalarType dtype, Scratch& scratch) {
  if (alpha_in_output_space(kind)) return square(weight, dtype, scratch);
  if (scale.scalar_type() == at::kDouble) return kind == Kind::weight ? scale.exp() * weight * weight : scale.exp();
  const Tensor out = scratch.empty_like(scale, dtype);
  if (kind == Kind::weight) run_map(Map::exp_square, {scale, weight}, {out});
  else run_map(Map::exp, {scale}, {out});
  return out;
}

// ---- elementwise passes ------------------------------------------------------------------------------------------

// fp64 is the business of the callers.
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

Tensor square(const Tensor& x, at::ScalarType dtype, Scratch& scratch) {
  if (x.scalar_type() == at::kDouble) return x * x;
  const Tensor out = scratch.empty_like(x, dtype);
  run_map(Map::square, {x}, {out});
  return out;
}

namespace {

// A result's memory: `spent`, which nobody reads afterwards, if it has the dtype. Fresh pages cost more than passes.
Tensor empty_or(const Tensor& spent, at::ScalarType dtype) {
  return spent.scalar_type() == dtype ? spent : at::empty_like(spent, spent.options().dtype(dtype));
}

}  // namespace

Tensor add_product(const Tensor& base, const Tensor& x, const Tensor& product, at::ScalarType dtype) {
  if (x.scalar_type() == at::kDouble) return base + 2 * x * product;
  const Tensor out = empty_or(base, dtype);
  run_map(Map::add_product, {base, x, product}, {out});
  return out;
}

Tensor product_exp(const Tensor& product, const Tensor& log_sigma2) {
  if (product.scalar_type() == at::kDouble) return product * log_sigma2.exp();
  const Tensor out = empty_or(product, log_sigma2.scalar_type());
  run_map(Map::product_exp, {product, log_sigma2}, {out});
  return out;
}

std::tuple<Tensor, Tensor> weight_grads(const Tensor& base, const Tensor& weight, const Tensor& dsigma2,
                                        const Tensor& log_alpha) {
  if (base.scalar_type() == at::kDouble) {
    const Tensor scaled = log_alpha.exp() * weight * dsigma2;
    return {base + 2 * scaled, scaled * weight};
  }
  const Tensor grad_weight = empty_or(base, weight.scalar_type());
  const Tensor grad_log_alpha = empty_or(dsigma2, log_alpha.scalar_type());
  run_map(Map::weight_grads, {base, weight, dsigma2, log_alpha}, {grad_weight, grad_log_alpha});
  return {grad_weight, grad_log_alpha};
}

// ---- noise -------------------------------------------------------------------------------------------------------

namespace {

Alpha alpha_of(const Tensor& alpha) {
  if (!alpha.defined()) return {nullptr, 0};
  return {alpha.const_data_ptr<float>(), alpha.numel() == 1 ? 0 : 1};
}

// How an output is cut: a task is a slab of rows by a strip of columns, and no slab crosses a multiple of `period`.
struct Cut {
  int64_t period, slab_rows, strip_cols;
  int64_t slabs(int64_t rows) const { return rows / period * per_period(); }
  int64_t per_period() const { return (period + slab_rows - 1) / slab_rows; }
};

Cut cut_of(const LrtNoise& noise, int64_t rows, int64_t cols) {
  constexpr int64_t kTask = 8 * kTile;
  constexpr int64_t kStrip = kTile / 4;  // tiles of four rows at least
  switch (noise.layout) {
    case LrtLayout::features: return {rows, kTask / kStrip, std::min(cols, kTile / std::min<int64_t>(rows, 4))};
    case LrtLayout::channels_first: {  // whole rows, for their sums
      const int64_t period = noise.channels_total == noise.channels ? rows : noise.channels;
      return {period, std::min(period, std::max<int64_t>(1, kTask / cols)), cols};
    }
    case LrtLayout::channels_last: {  // slabs begin at whole quads of positions
      const int64_t strip = std::min(cols, kStrip);
      return {noise.positions, kTask / strip & ~3, strip};
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

// Calls body(tile, slab) for tiles of at most kTile elements that cover rows x cols. Slabs and strips are the same for
// any number of threads, and the tiles of one follow each other in one thread.
template <class Body> void for_tiles_of(const LrtNoise& noise, int64_t rows, int64_t cols, const Body& body) {
  if (rows == 0 || cols == 0) return;
  const Cut cut = cut_of(noise, rows, cols);
  const int64_t strips = (cols + cut.strip_cols - 1) / cut.strip_cols, per_period = cut.per_period();
  at::parallel_for(0, cut.slabs(rows) * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slab = i / strips, first_col = i % strips * cut.strip_cols;
      const int64_t end_col = std::min(first_col + cut.strip_cols, cols);
      const int64_t first_row = slab / per_period * cut.period + slab % per_period * cut.slab_rows;
      const int64_t end_row = std::min(first_row + cut.slab_rows, (slab / per_period + 1) * cut.period);
      const int64_t tile_cols = std::min<int64_t>(kTile, end_col - first_col);
      int64_t tile_rows = kTile / tile_cols;
      if (noise.layout == LrtLayout::channels_last) tile_rows = kTile / ((tile_cols + 3) & ~3) & ~3;
      for (int64_t row = first_row; row < end_row; row += tile_rows)
        for (int64_t col = first_col; col < end_col; col += tile_cols)
          body(Tile{row, std::min(tile_rows, end_row - row), col, std::min(tile_cols, end_col - col)}, slab);
    }
  });
}

// The noise as a matrix, for fp64.
Tensor noise_matrix(const LrtNoise& noise, int64_t rows, int64_t cols, at::ScalarType dtype) {
  if (noise.layout == LrtLayout::features) return draw_noise(noise.stream, rows, cols, dtype);
  const bool last = noise.layout == LrtLayout::channels_last;
  const int64_t batch = rows / (last ? noise.positions : noise.channels);
  const Tensor drawn = draw_noise(noise.stream, batch * noise.channels_total, noise.positions, dtype)
                           .view({batch, noise.channels_total, noise.positions})
                           .narrow(1, 0, noise.channels);
  return (last ? drawn.transpose(1, 2) : drawn).reshape({rows, cols});
}

// [O] or [1] beside the matrix
Tensor per_channel(const LrtNoise& noise, const Tensor& t, int64_t rows) {
  if (noise.layout != LrtLayout::channels_first || t.numel() == 1) return t;
  return t.repeat({rows / noise.channels}).unsqueeze(1);
}

VarianceGradient sample_backward_fp64(const LrtNoise& noise, const Tensor& grad, const Tensor& alpha,
                                      const Tensor& var, bool want_bias, bool want_alpha) {
  const int64_t rows = var.size(0), cols = var.size(1);
  const Tensor a = alpha.defined() ? per_channel(noise, alpha, rows) : Tensor();
  const Tensor v = a.defined() ? var * a : var;
  Tensor dv = grad * noise_matrix(noise, rows, cols, at::kDouble) * 0.5 / (v.clamp_min(0) + 1e-16).sqrt();
  if (a.defined()) dv = dv * a;
  VarianceGradient result;
  result.var = at::where(v < 0, at::zeros({}, dv.options()), dv);
  const bool by_row = noise.layout == LrtLayout::channels_first;
  const auto sums = [&](const Tensor& t) {  // [.., O]
    return by_row ? t.sum(1).view({-1, noise.channels}) : t.sum(0, /*keepdim=*/true);
  };
  if (want_bias) result.bias = sums(grad).sum(0);
  if (want_alpha) result.alpha = sums(result.var * var);
  return result;
}

}  // namespace

void sample_forward(const LrtNoise& noise, const Tensor& mean, const Tensor& bias, const Tensor& alpha,
                    const Tensor& var, const Tensor& out) {
  const int64_t rows = var.size(0), cols = var.size(1);
  if (var.scalar_type() == at::kDouble) {
    const Tensor v = alpha.defined() ? var * per_channel(noise, alpha, rows) : var;
    Tensor y = (v.clamp_min(0) + 1e-16).sqrt() * noise_matrix(noise, rows, cols, at::kDouble);
    if (mean.defined()) y += mean;
    if (bias.defined()) y += per_channel(noise, bias, rows);
    out.copy_(y);
    return;
  }
  const LrtSample sample{noise,
                         mean.defined() ? matrix_of(mean, cols) : Matrix{nullptr, cols, DType::f32},
                         bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                         alpha_of(alpha),
                         matrix_of(var, cols),
                         matrix_of(out, cols)};
  const auto kernel = kernels().lrt_sample;
  for_tiles_of(noise, rows, cols, [&](Tile tile, int64_t) { kernel(sample, tile); });
}

VarianceGradient sample_backward(const LrtNoise& noise, const Tensor& grad, const Tensor& alpha, const Tensor& var,
                                 at::ScalarType dtype, bool want_bias, bool want_alpha, Scratch* scratch) {
  const int64_t rows = var.size(0), cols = var.size(1);
  if (var.scalar_type() == at::kDouble)
    return sample_backward_fp64(noise, grad, alpha, var, want_bias, want_alpha);
  // Sums of columns are taken slab by slab and then added in order, those of rows row by row: the same bits for any
  // number of threads.
  const bool by_row = noise.layout == LrtLayout::channels_first;
  const int64_t slabs = rows * cols == 0 ? 0 : cut_of(noise, rows, cols).slabs(rows);
  const auto options = var.options().dtype(at::kFloat);
  const auto make_sums = [&](bool wanted) {
    return wanted ? at::zeros({by_row ? rows / noise.channels : slabs, by_row ? noise.channels : cols}, options)
                  : Tensor();
  };
  const Tensor bias_sums = make_sums(want_bias), alpha_sums = make_sums(want_alpha);
  VarianceGradient result;
  result.var = scratch ? scratch->empty(var.sizes(), var.options().dtype(dtype))
                       : at::empty(var.sizes(), var.options().dtype(dtype));
  const LrtSampleBackward backward{noise, matrix_of(grad, cols), alpha_of(alpha), matrix_of(var, cols),
                                   matrix_of(result.var, cols)};
  const auto kernel = kernels().lrt_sample_backward;
  for_tiles_of(noise, rows, cols, [&](Tile tile, int64_t slab) {
    const int64_t place = by_row ? tile.row : slab * cols + tile.col;
    const auto sums = [&](const Tensor& t) { return t.defined() ? t.data_ptr<float>() + place : nullptr; };
    kernel(backward, tile, sums(bias_sums), sums(alpha_sums));
  });
  if (want_bias) result.bias = bias_sums.sum(0);
  result.alpha = alpha_sums;
  return result;
}

Tensor alpha_gradient(Kind kind, const Tensor& partial_sums, const Tensor& scale) {
  const Tensor sum = kind == Kind::layer ? partial_sums.sum().reshape({1}) : partial_sums.sum(0);
  return sum.to(scale.scalar_type());
}

}  // namespace losssurf
