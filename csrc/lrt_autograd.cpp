// Autograd of lrt_linear and lrt_conv, for every device. In C++ because a small layer's step is mostly the overhead of
// Python's register_autograd (130 of 190 us at 32 x 500 -> 10). ops/lrt.py and ops/lrt_conv.py have the contracts; the
// backward operators have autograd formulas of their own there, so the gradients can be differentiated again.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace losssurf {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What an operator takes after its parameterization: `Place` is kept as one tuple for its backward, and `Extra`, which
// depends on the parameters alone, is for the forward. It gets no gradient; weight and scale get theirs all the same.
template <class... T> struct Types {};

template <class T> struct Kept {
  using type = T;
  static type keep(const T& t) { return t; }
  static type of(const c10::IValue& v) { return v.to<T>(); }
};
template <> struct Kept<SymIntArrayRef> {
  using type = std::vector<SymInt>;
  static type keep(SymIntArrayRef list) { return list.vec(); }
  static type of(const c10::IValue& v) { return v.toSymIntVector(); }
};

template <class Signature> c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

template <class Operator, class Place, class Extra> struct Differentiable;
template <class Operator, class... Place, class... Extra>
struct Differentiable<Operator, Types<Place...>, Types<Extra...>>
    : torch::autograd::Function<Differentiable<Operator, Types<Place...>, Types<Extra...>>> {
  static constexpr size_t kInputs = 6 + sizeof...(Place) + sizeof...(Extra);
  using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const MaybeTensor&, const Tensor&, const MaybeTensor&,
                                             const Tensor&, std::string_view, Place..., Extra...);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const MaybeTensor&,
                                                              const Tensor&, bool, const Tensor&, const Tensor&,
                                                              std::string_view, std::array<bool, 4>, Place...);

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& weight, const Tensor& scale,
                               const MaybeTensor& bias, const Tensor& seed, std::string_view parameterization,
                               Place... place, Extra... extra) {
    static const auto op = find<Forward>(Operator::forward);
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, var] = op.call(x, weight, scale, bias, seed, parameterization, place..., extra...);
    ctx->save_for_backward({x, weight.value_or(Tensor()), scale, var, seed});
    ctx->saved_data["parameterization"] = std::string(parameterization);
    ctx->saved_data["place"] = std::tuple<typename Kept<Place>::type...>(Kept<Place>::keep(place)...);
    if (bias) ctx->saved_data["bias"] = bias->scalar_type();
    ctx->mark_non_differentiable({var});
    ctx->set_materialize_grads(false);  // var's would be zeros of its size
    return {y, var};
  }

  template <size_t... I>
  static auto call_backward(AutogradContext* ctx, const Tensor& grad, const variable_list& saved,
                            std::array<bool, 4> needed, std::index_sequence<I...>) {
    static const auto op = find<Backward>(Operator::backward);
    const std::vector<c10::IValue> place = ctx->saved_data["place"].toTupleRef().elements().vec();
    return op.call(grad, saved[0], maybe(saved[1]), saved[2], ctx->saved_data.count("bias"), saved[3], saved[4],
                   ctx->saved_data["parameterization"].toStringRef(), needed,
                   Kept<Place>::of(place[I])...);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(kInputs);
    const variable_list saved = ctx->get_saved_variables();  // once: checkpoints unpack them here
    const bool has_weight = saved[1].defined(), has_bias = ctx->saved_data.count("bias");
    // Edges are numbered over the tensors that were given.
    int edge = 0;
    const bool need_x = ctx->needs_input_grad(edge++);
    const bool need_weight = has_weight && ctx->needs_input_grad(edge++);
    const bool need_scale = ctx->needs_input_grad(edge++);
    const bool need_bias = has_bias && ctx->needs_input_grad(edge++);
    // Without create_graph, straight to the kernel; with it, through the operator's own autograd formula.
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    auto [x, weight, scale, bias] = call_backward(ctx, grads[0], saved, {need_x, need_weight, need_scale, need_bias},
                                                  std::index_sequence_for<Place...>());
    if (need_bias) bias = bias.to(ctx->saved_data["bias"].toScalarType());
    const auto keep = [](bool needed, const Tensor& t) { return needed ? t : Tensor(); };
    variable_list result{keep(need_x, x), keep(need_weight, weight), keep(need_scale, scale), keep(need_bias, bias)};
    result.resize(kInputs);
    return result;
  }

  static std::tuple<Tensor, Tensor> call(const Tensor& x, const MaybeTensor& weight, const Tensor& scale,
                                         const MaybeTensor& bias, const Tensor& seed,
                                         std::string_view parameterization, Place... place, Extra... extra) {
    const variable_list out = Differentiable::apply(x, weight, scale, bias, seed, parameterization,
                                                    std::move(place)..., std::move(extra)...);
    return {out[0], out[1]};
  }
};

struct Linear {
  static constexpr auto forward = "losssurf_fast::lrt_linear", backward = "losssurf_fast::lrt_linear_backward";
};
struct Conv {
  static constexpr auto forward = "losssurf_fast::lrt_conv", backward = "losssurf_fast::lrt_conv_backward";
};

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, Autograd, m) {
  using c10::SymInt, c10::SymIntArrayRef;
  using losssurf::Differentiable, losssurf::Types, losssurf::MaybeTensor;
  m.impl("lrt_linear", &Differentiable<losssurf::Linear, Types<SymInt, SymInt, SymInt>,
                                       Types<const MaybeTensor&, const MaybeTensor&>>::call);
  m.impl("lrt_conv", &Differentiable<losssurf::Conv,
                                     Types<SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool, SymIntArrayRef, SymInt,
                                           SymInt, SymInt, SymInt>,
                                     Types<>>::call);
}
