// Library GEMMs and the temporaries around them.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <limits>
#include <optional>
#include <string_view>

namespace losssurf {

// For the ATen calls inside a kernel: no autograd bookkeeping, and no autocast, since our operators choose their
// dtypes themselves, also when backward runs under autocast.
struct KernelScope {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(c10::DispatchKey::AutocastCPU)};
};

inline at::ScalarType wide_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Temporaries of one call, in memory that the thread keeps: fresh pages cost more than the passes that fill them
// (half of the backward GEMMs' time at 64 x 784 -> 512). A thread keeps at most kSlots blocks of kLargest bytes.
class Scratch {
 public:
  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    static thread_local std::array<at::Tensor, kSlots> kept;
    const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
    if (bytes > kLargest || next_ == kSlots) return at::empty(sizes, options);
    at::Tensor& slot = kept[next_++];
    if (!slot.defined() || slot.numel() < bytes) slot = at::empty({bytes}, at::kByte);
    at::Tensor out = slot.narrow(0, 0, bytes).view(c10::typeMetaToScalarType(options.dtype())).view(sizes);
    // As at::empty does, so that tests see reads of what nobody wrote.
    if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
      out.fill_(std::numeric_limits<double>::quiet_NaN());
    return out;
  }

  // Laid out like t, which is dense.
  at::Tensor empty_like(const at::Tensor& t, at::ScalarType dtype) {
    return empty({t.numel()}, t.options().dtype(dtype)).as_strided(t.sizes(), t.strides());
  }

  // What was taken after mark() may be given out again after release() of it.
  size_t mark() const { return next_; }
  void release(size_t mark) { next_ = mark; }
  static constexpr int64_t kLargest = 16 << 20;

  // t in `dtype`, contiguous: t itself where it is that already.
  at::Tensor cast(const at::Tensor& t, at::ScalarType dtype) {
    if (t.scalar_type() == dtype) return t.contiguous();
    return empty(t.sizes(), t.options().dtype(dtype)).copy_(t);
  }

 private:
  static constexpr size_t kSlots = 12;
  size_t next_ = 0;
};

inline bool on_amd() {
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
}

// a [M, K] times b [K, N], any strides; a temporary where `scratch` is given.
//
// On AMD, MKL takes its AVX2 path and oneDNN is twice as fast in fp32; elsewhere MKL is level or ahead, and for small
// products oneDNN's fixed cost of about 10 us decides. oneDNN is reached through a private operator of torch, so its
// absence is no error.
inline at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, Scratch* scratch = nullptr) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto onednn = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  constexpr int64_t kWorthOneDNN = 1 << 22;  // multiply-adds
  if (on_amd() && onednn && a.scalar_type() == at::kFloat && a.size(0) * a.size(1) * b.size(1) >= kWorthOneDNN)
    return onednn->typed<Linear>().call(a, b.t(), std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
  if (!scratch) return at::mm(a, b);
  at::Tensor out = scratch->empty({a.size(0), b.size(1)}, a.options());
  return at::mm_out(out, a, b);
}

}  // namespace losssurf
