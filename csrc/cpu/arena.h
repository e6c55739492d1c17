// A list of tensors in one allocation: a model's hundreds of small results cost more to allocate than to compute, and
// fresh pages of large ones come in one piece.
#pragma once
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <vector>

namespace losssurf {

// Where the elements of a tensor lie. Its sizes belong to another tensor, which lives longer.
struct Layout {
  at::IntArrayRef sizes;
  c10::DimVector strides;
  int64_t numel;
  at::ScalarType dtype;

  // as at::empty_like lays out its result
  static Layout like(const at::Tensor& t) {
    Layout layout{t.sizes(), {}, t.numel(), t.scalar_type()};
    if (t.is_contiguous() || t.is_non_overlapping_and_dense()) layout.strides = t.strides();
    else layout.strides = at::infer_dense_strides(t.sizes(), t.strides());
    return layout;
  }
  bool is_of(const at::Tensor& t) const {
    if (t.strides() == at::IntArrayRef(strides) || numel == 0) return true;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] != 1 && t.stride(d) != strides[d]) return false;
    return true;
  }
  // `t`, or its copy, in this layout
  at::Tensor arrange(const at::Tensor& t) const {
    return is_of(t) ? t : at::empty_strided(sizes, strides, t.options()).copy_(t);
  }
};

// Uninitialised tensors, one after the other in one allocation for each dtype, aligned to cache lines. The allocation
// lives as long as any of them, but each has a storage of its own: to autograd, torch.compile and torch.save they have
// nothing to do with each other.
inline std::vector<at::Tensor> empty_together(const std::vector<Layout>& layouts) {
  constexpr size_t kLine = 64;
  constexpr size_t kDtypes = static_cast<size_t>(at::ScalarType::NumOptions);
  size_t ends[kDtypes] = {};
  std::vector<size_t> begins;
  begins.reserve(layouts.size());
  for (const Layout& layout : layouts) {
    size_t& end = ends[static_cast<size_t>(layout.dtype)];
    begins.push_back(end);
    end += (layout.numel * c10::elementSize(layout.dtype) + kLine - 1) / kLine * kLine;
  }
  at::Tensor blocks[kDtypes];
  std::vector<at::Tensor> tensors;
  tensors.reserve(layouts.size());
  for (size_t i = 0; i < layouts.size(); ++i) {
    const Layout& layout = layouts[i];
    const auto dtype = static_cast<size_t>(layout.dtype);
    const size_t size = c10::elementSize(layout.dtype);
    at::Tensor& block = blocks[dtype];
    if (!block.defined()) block = at::empty({static_cast<int64_t>(ends[dtype] / size)}, layout.dtype);
    c10::StorageImpl* const owner = block.storage().unsafeGetStorageImpl();
    c10::raw::intrusive_ptr::incref(owner);
    const auto release = [](void* impl) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(impl)); };
    c10::DataPtr memory(static_cast<char*>(block.data_ptr()) + begins[i], owner, release, at::kCPU);
    c10::Storage storage(c10::Storage::use_byte_size_t(), layout.numel * size, std::move(memory),
                         c10::GetAllocator(at::kCPU), /*resizable=*/true);
    at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(at::DispatchKey::CPU), c10::scalarTypeToTypeMeta(layout.dtype));
    t.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes, layout.strides);
    tensors.push_back(std::move(t));
  }
  return tensors;
}

}  // namespace losssurf
