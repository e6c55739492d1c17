// curve.cu as the operators curve_weights and curve_weights_backward. Every result has an allocation of its own: of a
// storage inside of one, torch's allocator would not hear by record_stream that another stream still reads it.
#include "../curve_checks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <map>

#include "curve.h"
#include "glue.h"

namespace losssurf {
namespace {

using at::Tensor;

void check_count(const char* name, const Tensor& coefficients) {
  TORCH_CHECK_VALUE(coefficients.numel() <= losssurf_curve_max_bends(), name, ": coefficients must be at most ",
                    losssurf_curve_max_bends(), " on a GPU, got ", coefficients.numel());
}

// What the kernels walk through, by dtype: one launch has one.
class Rows {
 public:
  explicit Rows(size_t others) { others_.reserve(others); }  // of all rows, which point at them
  void add(const Tensor& weight) {
    const CurveTensors row = {weight.numel(), address(weight), others_.data() + others_.size()};
    groups_[float_type(weight)].push_back(row);
  }
  // one more of the last row; an undefined tensor is null
  void add_other(const Tensor& t) { others_.push_back(t.defined() ? address(t) : nullptr); }

  // Calls run(type, tensors, number of tensors, coefficients, stream) for every dtype.
  template <class Run> void launch(const Tensor& coefficients, const Run& run) const {
    for (const auto& [type, tensors] : groups_) {
      const Tensor c = coefficients.to(type == FloatType::f64 ? at::kDouble : at::kFloat).contiguous();
      run(type, tensors.data(), static_cast<int64_t>(tensors.size()),
          CurveCoefficients{c.const_data_ptr(), static_cast<int>(c.numel())}, c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

 private:
  void* address(const Tensor& t) {
    kept_.push_back(t);
    return const_cast<void*>(t.const_data_ptr());
  }
  std::map<FloatType, std::vector<CurveTensors>> groups_;
  std::vector<void*> others_;
  std::vector<Tensor> kept_;  // copies live until they have been read
};

std::vector<Tensor> curve_weights_cuda(at::TensorList bends, const Tensor& coefficients) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const size_t size = check_curve_weights(bends, coefficients);
  check_count("curve_weights", coefficients);
  const c10::cuda::CUDAGuard guard(coefficients.device());
  std::vector<Tensor> weights;
  Rows rows(bends.size());
  for (size_t p = 0; p < size; ++p) {
    weights.push_back(at::empty_like(bends[p]));
    rows.add(weights[p]);
    for (size_t i = p; i < bends.size(); i += size) rows.add_other(in_order_of(weights[p], bends[i]));
  }
  rows.launch(coefficients, losssurf_curve_weights);
  return weights;
}

std::vector<Tensor> curve_weights_backward_cuda(at::TensorList grads, at::TensorList bends, const Tensor& coefficients,
                                                const c10::List<bool>& needed, bool need_coefficients) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const size_t size =
      check_curve_weights_backward(grads, bends, coefficients, needed.size(), need_coefficients);
  check_count("curve_weights_backward", coefficients);
  const c10::cuda::CUDAGuard guard(coefficients.device());
  const at::TensorList like = bends.empty() ? grads : bends;
  std::vector<Tensor> result, found(needed.size());  // in the result's order, and as `needed` has them
  for (size_t i = 0; i < needed.size(); ++i)
    if (needed[i]) result.push_back(found[i] = at::empty_like(like[i % size]));
  Rows rows(needed.size() + bends.size());
  for (size_t p = 0; p < size; ++p) {
    Tensor order;
    for (size_t i = p; i < needed.size(); i += size)
      if (found[i].defined()) order = found[i];
    if (!order.defined()) {
      if (!need_coefficients) continue;
      order = like[p].is_non_overlapping_and_dense() ? like[p] : like[p].contiguous();
    }
    rows.add(in_order_of(order, grads[p]));
    for (size_t i = p; i < needed.size(); i += size) rows.add_other(found[i]);
    for (size_t i = p; i < bends.size() && need_coefficients; i += size) rows.add_other(in_order_of(order, bends[i]));
  }
  const int64_t count = coefficients.numel();
  Tensor partials;
  if (need_coefficients) partials = at::zeros({count, kCurvePartials}, coefficients.options().dtype(at::kDouble));
  double* const sums = need_coefficients ? partials.data_ptr<double>() : nullptr;
  rows.launch(coefficients, [&](FloatType type, const CurveTensors* tensors, int64_t num_tensors, CurveCoefficients c,
                                cudaStream_t stream) {
    losssurf_curve_weights_backward(type, tensors, num_tensors, c, sums, stream);
  });
  if (need_coefficients) {
    const Tensor& grad = result.emplace_back(at::empty({count}, coefficients.options()));
    losssurf_curve_sum(sums, grad.data_ptr(), float_type(coefficients), static_cast<int>(count),
                       c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return result;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CUDA, m) {
  m.impl("curve_weights", &losssurf::curve_weights_cuda);
  m.impl("curve_weights_backward", &losssurf::curve_weights_backward_cuda);
}
