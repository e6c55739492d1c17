// CPU kernels of lrt_conv: ops/lrt_conv.py has the contract. The library's convolutions, and one fused pass at each end.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>

#include "arena.h"
#include "lrt_passes.h"

namespace losssurf {
namespace {

struct Geometry {
  at::IntArrayRef stride, padding, dilation;
  bool transposed;
  at::IntArrayRef output_padding;
  int64_t groups;
};

Tensor convolve(const Tensor& x, const Tensor& weight, const Geometry& g) {
  return at::convolution(x, weight, {}, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups);
}

// Gradients to x and weight, each undefined where not asked for.
std::tuple<Tensor, Tensor> convolve_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Geometry& g, bool need_x, bool need_weight) {
  if (!need_x && !need_weight) return {};
  if (grad.numel() == 0 || x.numel() == 0)  // the library asks for at least one element
    return {need_x ? at::zeros_like(x) : Tensor(), need_weight ? at::zeros_like(weight) : Tensor()};
  auto [grad_x, grad_weight, _] =
      at::convolution_backward(grad, x, weight, std::nullopt, g.stride, g.padding, g.dilation, g.transposed,
                               g.output_padding, g.groups, {need_x, need_weight, false});
  return {grad_x, grad_weight};
}

// ---- layouts -----------------------------------------------------------------------------------------------------

// t in the memory format that the library sees in it, without gaps.
Tensor dense(const Tensor& t) { return t.contiguous(t.suggest_memory_format()); }

Tensor cast(const Tensor& t, at::ScalarType dtype, Scratch& scratch) {
  return t.scalar_type() == dtype ? t : scratch.empty_like(t, dtype).copy_(t);
}

bool channels_last(const Tensor& output) { return !output.is_contiguous(); }

// The output [N, O, *S], dense, as the matrix that it is in memory.
Tensor matrix(const Tensor& output) {
  if (channels_last(output)) return output.movedim(1, -1).flatten(0, -2);
  return output.flatten(2).flatten(0, 1);
}

LrtNoise noise_of(const Tensor& output, const Tensor& seed, int64_t row_offset, int64_t channels_total,
                  int64_t sample) {
  const int64_t channels = output.size(1), total = channels_total ? channels_total : channels;
  TORCH_CHECK_VALUE(total >= channels, "lrt_conv: channels_total must be at least ", channels, ", got ", total);
  const int64_t positions = c10::multiply_integers(output.sizes().slice(2));
  return {noise_stream(seed, row_offset, 0, sample),
          channels_last(output) ? LrtLayout::channels_last : LrtLayout::channels_first, channels, total, positions};
}

// ---- operators ---------------------------------------------------------------------------------------------------

// The parameters as the passes want them: dense, and in one order where they are combined element by element.
struct Parameters {
  Kind kind;
  Tensor weight, scale;

  Parameters(std::string_view parameterization, const MaybeTensor& maybe_weight, const Tensor& scale_in)
      : kind(kind_of(parameterization)) {
    if (kind != Kind::variance) {
      TORCH_CHECK_VALUE(maybe_weight, "lrt_conv: weight is missing for parameterization '", parameterization, "'");
      weight = dense(*maybe_weight);
    }
    if (alpha_in_output_space(kind)) scale = scale_in.contiguous();
    else scale = scale_in.contiguous((kind == Kind::variance ? scale_in : weight).suggest_memory_format());
  }
  const Tensor& kernel() const { return kind == Kind::variance ? scale : weight; }

  // What the kernels' pointers rely on; ops/lrt_conv_functions.py has the checks that explain.
  void check(int64_t outputs) const {
    const int64_t scales = kind == Kind::layer ? 1 : kind == Kind::neuron ? outputs : kernel().numel();
    TORCH_CHECK_VALUE(scale.numel() == scales, "lrt_conv: scale must have ", scales, " elements, got ", scale.sizes());
  }
};

// Samples at a time. A gradient to var that Scratch does not hold would cost fresh pages, more than the passes over it.
int64_t samples_at_once(const Tensor& var, at::ScalarType x_dtype) {
  constexpr int64_t kPart = 4 << 20;
  if (var.nbytes() <= Scratch::kLargest || var.scalar_type() == at::kDouble || var.scalar_type() != x_dtype)
    return std::max<int64_t>(1, var.size(0));
  return std::max<int64_t>(1, kPart / (var.nbytes() / var.size(0)));
}

void accumulate(Tensor& sum, const Tensor& part) {
  if (!sum.defined()) sum = part;
  else if (part.defined()) sum = sum.to(wide_dtype(sum)).add_(part);
}

std::tuple<Tensor, Tensor> lrt_conv_cpu(const Tensor& x, const MaybeTensor& weight, const Tensor& scale,
                                        const MaybeTensor& maybe_bias, const Tensor& seed,
                                        std::string_view parameterization, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                        at::IntArrayRef output_padding, int64_t groups, int64_t row_offset,
                                        int64_t channels_total, int64_t sample) {
  const KernelScope scope;
  const Geometry geometry{stride, padding, dilation, transposed, output_padding, groups};
  const Parameters p(parameterization, weight, scale);
  const auto operand = operand_dtype(x);
  Scratch scratch;
  const Tensor a = cast(dense(x), operand, scratch);
  const int64_t outputs = transposed ? p.kernel().size(1) * groups : p.kernel().size(0);
  p.check(outputs);
  const Tensor bias = maybe_bias ? maybe_bias->to(wide_dtype(x)).contiguous() : Tensor();
  TORCH_CHECK_VALUE(!bias.defined() || bias.numel() == outputs, "lrt_conv: bias must be [", outputs, "], got ",
                    bias.sizes());
  const Tensor var = dense(convolve(square(a, operand, scratch),
                                    variance_operand(p.kind, p.weight, p.scale, operand, scratch), geometry));
  const Tensor mean = p.weight.defined() ? convolve(a, cast(p.weight, operand, scratch), geometry)
                                               .contiguous(var.suggest_memory_format())
                                         : Tensor();
  const bool in_place = mean.defined() && mean.scalar_type() == x.scalar_type();
  const Tensor y = in_place ? mean : at::empty_like(var, x.options());
  const LrtNoise noise = noise_of(var, seed, row_offset, channels_total, sample);
  sample_forward(noise, mean.defined() ? matrix(mean) : mean, bias, output_alpha(p.kind, p.scale), matrix(var),
                 matrix(y));
  return {y, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrt_conv_backward_cpu(
    const Tensor& grad_in, const Tensor& x_in, const MaybeTensor& weight_in, const Tensor& scale_in, bool has_bias,
    const Tensor& var_in, const Tensor& seed, std::string_view parameterization, std::array<bool, 4> needed,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, int64_t row_offset, int64_t channels_total, int64_t sample) {
  const KernelScope scope;
  TORCH_CHECK_VALUE(grad_in.sizes() == var_in.sizes(), "lrt_conv_backward: grad must have var's shape ",
                    var_in.sizes(), ", got ", grad_in.sizes());
  const Geometry geometry{stride, padding, dilation, transposed, output_padding, groups};
  const Parameters p(parameterization, weight_in, scale_in);
  const auto operand = operand_dtype(x_in);
  const auto [need_x, need_weight, need_scale, need_bias] = needed;
  const bool outer_alpha = alpha_in_output_space(p.kind);
  Scratch scratch;
  const Tensor a = cast(dense(x_in), operand, scratch);
  const Tensor var = dense(var_in), grad = grad_in.contiguous(var.suggest_memory_format());
  p.check(var.size(1));
  const bool need_direct = need_weight || (need_scale && p.kind == Kind::weight);
  Tensor grad_x, grad_weight, grad_scale;
  if (p.weight.defined())
    std::tie(grad_x, grad_weight) = convolve_backward(cast(grad, operand, scratch), a,
                                                      cast(p.weight, operand, scratch), geometry, need_x, need_direct);
  else if (need_x) grad_x = at::zeros_like(a);
  const auto arrange = [](const Tensor& t, const Tensor& like) {
    return t.defined() ? Layout::like(like).arrange(t) : t;
  };
  grad_x = arrange(grad_x, a);

  const bool need_sigma2 = (need_weight && p.kind != Kind::additive) || (need_scale && !outer_alpha);
  const Tensor alpha = output_alpha(p.kind, p.scale);
  const Tensor sigma2 =
      need_x ? variance_operand(p.kind, p.weight, p.scale, operand, scratch) : cast(p.kernel(), operand, scratch);
  Tensor dsigma2, grad_bias, alpha_sums;
  const int64_t step = samples_at_once(var, x_in.scalar_type());
  const size_t mark = scratch.mark();
  for (int64_t first = 0; first == 0 || first < var.size(0); first += step) {
    scratch.release(mark);
    const auto part = [&](const Tensor& t) { return t.narrow(0, first, std::min(step, t.size(0) - first)); };
    const Tensor v = part(var), x = part(a);
    const LrtNoise noise =
        noise_of(v, seed, row_offset + first * (channels_total ? channels_total : var.size(1)), channels_total, sample);
    const VarianceGradient dvar = sample_backward(noise, matrix(part(grad)), alpha, matrix(v), operand,
                                                  need_bias && has_bias, need_scale && outer_alpha, &scratch);
    accumulate(grad_bias, dvar.bias);
    if (dvar.alpha.defined()) accumulate(alpha_sums, dvar.alpha.sum(0));
    const Tensor squares = need_sigma2 ? square(x, operand, scratch) : x;  // else only its sizes count
    const auto [through_var, part_sigma2] =
        convolve_backward(dvar.var.as_strided(v.sizes(), v.strides()), squares, sigma2, geometry, need_x, need_sigma2);
    accumulate(dsigma2, part_sigma2);
    if (!need_x) continue;
    const Tensor sum = add_product(part(grad_x), x, arrange(through_var, x), x_in.scalar_type());
    if (step >= var.size(0)) grad_x = sum;  // else it lies in grad_x
  }
  dsigma2 = arrange(dsigma2, p.kernel());
  grad_weight = arrange(grad_weight, p.kernel());
  if (need_direct) {
    if (p.kind == Kind::weight) std::tie(grad_weight, grad_scale) = weight_grads(grad_weight, p.weight, dsigma2, p.scale);
    else if (outer_alpha) grad_weight = add_product(grad_weight, p.weight, dsigma2, p.weight.scalar_type());
    else grad_weight = grad_weight.to(p.weight.scalar_type());
  }
  if (need_scale && outer_alpha) grad_scale = alpha_gradient(p.kind, alpha_sums.unsqueeze(0), p.scale);
  else if (need_scale && p.kind != Kind::weight) grad_scale = product_exp(dsigma2, p.scale);
  const auto keep = [&](bool needed, const Tensor& t, const Tensor& like) {
    return needed ? arrange(t, like) : at::empty({0}, x_in.options());
  };
  return {keep(need_x, grad_x, x_in), keep(need_weight, grad_weight, weight_in.value_or(x_in)),
          keep(need_scale, grad_scale, scale_in),
          need_bias && has_bias ? grad_bias : at::empty({0}, x_in.options())};
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("lrt_conv", &losssurf::lrt_conv_cpu);
  m.impl("lrt_conv_backward", &losssurf::lrt_conv_backward_cpu);
}
