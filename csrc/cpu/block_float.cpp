// CPU kernels of block floating point: ops/block_float.py has the contract.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../averaging_checks.h"
#include "tiles.h"

namespace losssurf {
namespace {

using at::Tensor;

constexpr int kLowestExponent = -126, kNotFinite = 128;

void check_word_length(const char* name, int64_t word_length) {
  TORCH_CHECK_VALUE(word_length >= 2 && word_length <= 16, name, ": word_length must lie in [2, 16], got ", word_length);
}

// Chunks of `blocks` rows of `size` elements; index is the row, begin counts from the first element of all.
std::vector<Chunk> chunks_of_blocks(int64_t blocks, int64_t size) {
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < blocks; ++row)
    for (int64_t begin = 0; begin < size; begin += kTile)
      chunks.push_back({static_cast<size_t>(row), row * size + begin, std::min(kTile, size - begin)});
  return chunks;
}

std::tuple<Tensor, Tensor> block_float_quantize_cpu(const Tensor& x_in, const Tensor& seed, int64_t word_length,
                                                    bool per_row, int64_t row_offset, int64_t col_offset,
                                                    int64_t sample, bool stochastic) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* name = "block_float_quantize";
  TORCH_CHECK_TYPE(averaging_dtype(x_in.scalar_type()), name, ": x must have a floating dtype of ",
                   "(torch.float64, torch.float32, torch.bfloat16, torch.float16), got ", dtype_name(x_in));
  check_word_length(name, word_length);
  TORCH_CHECK_VALUE(!per_row || x_in.dim() > 0, name, ": x must have rows, got a 0-d tensor");
  const Tensor x = (x_in.scalar_type() == at::kDouble ? x_in.to(at::kFloat) : x_in).contiguous();
  const int64_t blocks = per_row ? x.size(0) : 1, size = blocks ? x.numel() / blocks : 0;
  const Tensor mantissa = at::empty(x.sizes(), x.options().dtype(word_length <= 8 ? at::kChar : at::kShort));
  const Tensor exponent = at::empty(per_row ? x.sizes().slice(0, 1) : at::IntArrayRef(), x.options().dtype(at::kInt));

  const std::vector<Chunk> chunks = chunks_of_blocks(blocks, size);
  std::vector<uint32_t> tops(chunks.size());
  for_chunks(chunks, 8, [&](Chunk chunk, int64_t i) {
    tops[i] = kernels().max_magnitude(chunk.n, array_of(x, chunk.begin));
  });
  std::vector<uint32_t> top(blocks);
  for (size_t i = 0; i < chunks.size(); ++i) top[chunks[i].index] = std::max(top[chunks[i].index], tops[i]);
  int32_t* e = exponent.data_ptr<int32_t>();
  for (int64_t b = 0; b < blocks; ++b) e[b] = std::max(static_cast<int>(top[b] >> 23) - 127, kLowestExponent);

  const NoiseStream noise = noise_stream(seed, row_offset, col_offset, sample);
  const int64_t bytes = mantissa.element_size();
  for_chunks(chunks, 8, [&](Chunk chunk, int64_t) {
    char* out = static_cast<char*>(mantissa.data_ptr()) + chunk.begin * bytes;
    if (e[chunk.index] == kNotFinite) return std::fill_n(out, chunk.n * bytes, char(0)), void();
    NoiseStream here = noise;
    here.col_offset += chunk.begin;
    kernels().block_float_quantize(stochastic ? &here : nullptr, chunk.n, array_of(x, chunk.begin), e[chunk.index],
                                   word_length, out);
  });
  return {mantissa, exponent};
}

Tensor block_float_dequantize_cpu(const Tensor& mantissa_in, const Tensor& exponent_in, int64_t word_length) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* name = "block_float_dequantize";
  check_word_length(name, word_length);
  const bool narrow = word_length <= 8;
  TORCH_CHECK_TYPE(mantissa_in.scalar_type() == (narrow ? at::kChar : at::kShort), name, ": mantissa must be ",
                   narrow ? "torch.int8" : "torch.int16", " for word_length ", word_length, ", got ",
                   dtype_name(mantissa_in));
  TORCH_CHECK_TYPE(exponent_in.scalar_type() == at::kInt, name, ": exponent must be torch.int32, got ",
                   dtype_name(exponent_in));
  const bool per_row = exponent_in.dim() > 0;
  TORCH_CHECK_VALUE(!per_row || (exponent_in.dim() == 1 && mantissa_in.dim() > 0 &&
                                 exponent_in.size(0) == mantissa_in.size(0)),
                    name, ": exponent must be 0-d or hold one number for each row of mantissa, got ",
                    shape_of(exponent_in.sizes()), " for ", shape_of(mantissa_in.sizes()));
  TORCH_CHECK_VALUE(exponent_in.device() == mantissa_in.device(), name, ": exponent must be on mantissa's ",
                    mantissa_in.device(), ", got ", exponent_in.device());
  const Tensor mantissa = mantissa_in.contiguous(), exponent = exponent_in.contiguous();
  const Tensor out = at::empty(mantissa.sizes(), mantissa.options().dtype(at::kFloat));
  const int64_t blocks = per_row ? mantissa.size(0) : 1, size = blocks ? mantissa.numel() / blocks : 0;
  const int32_t* e = exponent.const_data_ptr<int32_t>();
  for_chunks(chunks_of_blocks(blocks, size), 8, [&](Chunk chunk, int64_t) {
    float* values = out.data_ptr<float>() + chunk.begin;
    const char* from = static_cast<const char*>(mantissa.const_data_ptr()) + chunk.begin * mantissa.element_size();
    if (e[chunk.index] == kNotFinite) std::fill_n(values, chunk.n, std::numeric_limits<float>::quiet_NaN());
    else kernels().block_float_dequantize(chunk.n, from, e[chunk.index], word_length, values);
  });
  return out;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("block_float_quantize", &losssurf::block_float_quantize_cpu);
  m.impl("block_float_dequantize", &losssurf::block_float_dequantize_cpu);
}
