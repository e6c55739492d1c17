// Autograd of lrt_linear, for every device. In C++ because a small layer's step is mostly the overhead of Python's
// register_autograd (130 of 190 us at 32 x 500 -> 10). ops/lrt.py has the contract; lrt_linear_backward has an
// autograd formula of its own there, so the gradient can be differentiated again.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace losssurf {
namespace {

using at::Tensor;
using c10::SymInt;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const MaybeTensor&, const Tensor&, const MaybeTensor&,
                                           const Tensor&, std::string_view, SymInt, SymInt, SymInt);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const MaybeTensor&,
                                                            const Tensor&, bool, const Tensor&, const Tensor&,
                                                            std::string_view, std::array<bool, 4>, SymInt, SymInt,
                                                            SymInt);

template <class Signature> c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

struct LRTLinear : torch::autograd::Function<LRTLinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& weight, const Tensor& scale,
                               const MaybeTensor& bias, const Tensor& seed, std::string_view parameterization,
                               SymInt row_offset, SymInt col_offset, SymInt sample) {
    static const auto op = find<Forward>("losssurf_fast::lrt_linear");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, var] =
        op.call(x, weight, scale, bias, seed, parameterization, row_offset, col_offset, sample);
    ctx->save_for_backward({x, weight.value_or(Tensor()), scale, var, seed});
    ctx->saved_data["parameterization"] = std::string(parameterization);
    ctx->saved_data["place"] = std::vector<SymInt>{row_offset, col_offset, sample};
    if (bias) ctx->saved_data["bias"] = bias->scalar_type();
    ctx->mark_non_differentiable({var});
    return {y, var};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find<Backward>("losssurf_fast::lrt_linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const bool has_weight = saved[1].defined(), has_bias = ctx->saved_data.count("bias");
    // Edges are numbered over the tensors that were given.
    int edge = 0;
    const bool need_x = ctx->needs_input_grad(edge++);
    const bool need_weight = has_weight && ctx->needs_input_grad(edge++);
    const bool need_scale = ctx->needs_input_grad(edge++);
    const bool need_bias = has_bias && ctx->needs_input_grad(edge++);
    const auto place = ctx->saved_data["place"].toSymIntVector();
    // Without create_graph, straight to the kernel; with it, through the operator's own autograd formula.
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    auto [x, weight, scale, bias] =
        op.call(grads[0], saved[0], maybe(saved[1]), saved[2], has_bias, saved[3], saved[4],
                ctx->saved_data["parameterization"].toStringRef(), {need_x, need_weight, need_scale, need_bias},
                place[0], place[1], place[2]);
    if (need_bias) bias = bias.to(ctx->saved_data["bias"].toScalarType());
    const auto keep = [](bool needed, const Tensor& t) { return needed ? t : Tensor(); };
    variable_list result{keep(need_x, x), keep(need_weight, weight), keep(need_scale, scale), keep(need_bias, bias)};
    result.resize(9);
    return result;
  }
};

std::tuple<Tensor, Tensor> lrt_linear_autograd(const Tensor& x, const MaybeTensor& weight, const Tensor& scale,
                                               const MaybeTensor& bias, const Tensor& seed,
                                               std::string_view parameterization, SymInt row_offset,
                                               SymInt col_offset, SymInt sample) {
  const variable_list out = LRTLinear::apply(x, weight, scale, bias, seed, parameterization, std::move(row_offset),
                                             std::move(col_offset), std::move(sample));
  return {out[0], out[1]};
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, Autograd, m) { m.impl("lrt_linear", &losssurf::lrt_linear_autograd); }
