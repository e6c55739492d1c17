// A list of tensors in few allocations: a model's hundreds of small results cost more to allocate than to compute.
#pragma once
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <cstdint>
#include <utility>
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

// Uninitialised tensors, one after the other in blocks of memory, aligned to cache lines. A block lives as long as any
// of its tensors, but each has a storage of its own: to autograd, torch.compile and torch.save they have nothing to do
// with each other.
inline std::vector<at::Tensor> empty_together(const std::vector<Layout>& layouts) {
  // Bytes of a block of several tensors. glibc's malloc gives blocks over 32 MiB back to the system at once and often
  // smaller ones, too, so that each step pays for fresh pages: ResNet-50's weights and gradients take 160 ms in one
  // block, 61 in blocks of 16 MiB and 43 in any up to 8.
  constexpr size_t kBlock = 8 << 20;
  constexpr size_t kLine = 64;
  struct Block {
    at::ScalarType dtype;
    size_t bytes;
    at::Tensor memory;
  };
  constexpr size_t kDtypes = static_cast<size_t>(at::ScalarType::NumOptions), kNone = SIZE_MAX;
  size_t open[kDtypes];  // the block of a dtype that has room
  std::fill(open, open + kDtypes, kNone);
  std::vector<Block> blocks;
  std::vector<std::pair<size_t, size_t>> places;  // a tensor's block, and where it begins there
  places.reserve(layouts.size());
  for (const Layout& layout : layouts) {
    const size_t bytes = (layout.numel * c10::elementSize(layout.dtype) + kLine - 1) / kLine * kLine;
    size_t& number = open[static_cast<size_t>(layout.dtype)];
    if (number == kNone || blocks[number].bytes + bytes > kBlock) {
      number = blocks.size();
      blocks.push_back({layout.dtype, 0, {}});
    }
    places.emplace_back(number, blocks[number].bytes);
    blocks[number].bytes += bytes;
  }
  for (Block& block : blocks)
    block.memory = at::empty({static_cast<int64_t>(block.bytes / c10::elementSize(block.dtype))}, block.dtype);
  std::vector<at::Tensor> tensors;
  tensors.reserve(layouts.size());
  for (size_t i = 0; i < layouts.size(); ++i) {
    const Layout& layout = layouts[i];
    const at::Tensor& memory = blocks[places[i].first].memory;
    c10::StorageImpl* const owner = memory.storage().unsafeGetStorageImpl();
    c10::raw::intrusive_ptr::incref(owner);
    const auto release = [](void* impl) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(impl)); };
    c10::DataPtr place(static_cast<char*>(memory.data_ptr()) + places[i].second, owner, release, at::kCPU);
    c10::Storage storage(c10::Storage::use_byte_size_t(), layout.numel * c10::elementSize(layout.dtype),
                         std::move(place), c10::GetAllocator(at::kCPU), /*resizable=*/true);
    at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(at::DispatchKey::CPU), c10::scalarTypeToTypeMeta(layout.dtype));
    t.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes, layout.strides);
    tensors.push_back(std::move(t));
  }
  return tensors;
}

}  // namespace losssurf
