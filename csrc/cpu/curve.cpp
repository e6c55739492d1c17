// CPU kernels of curve_weights: ops/curve.py has the contract. One parallel region covers a whole model's tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "../curve_checks.h"
#include "../curve_math.h"
#include "arena.h"
#include "tiles.h"

namespace losssurf {
namespace {

using at::Tensor;

constexpr int64_t kChunk = 4 * kTile;     // elements of a kernel call
// Bytes. To store 100 MB past the caches saves 20 % of a step; to store 7 MB so gained nothing. 16 MiB lies between.
constexpr size_t kLargeList = 16 << 20;

// Coefficients as both the fp32 kernels and the fp64 loops want them.
struct Coefficients {
  std::vector<double> wide;
  std::vector<float> narrow;

  static Coefficients of(const Tensor& coefficients) {
    const Tensor c = coefficients.to(at::kDouble).contiguous();
    const double* values = c.const_data_ptr<double>();
    return {{values, values + c.numel()}, {values, values + c.numel()}};
  }
};

// The bends that a sum reads, those whose coefficient is not 0 in its dtype, and their coefficients.
struct Terms {
  std::vector<size_t> bends;
  Coefficients read;

  static Terms of(const Coefficients& all, bool is_double) {
    Terms terms;
    for (size_t j = 0; j < all.wide.size(); ++j)
      if (is_double ? all.wide[j] != 0 : all.narrow[j] != 0) {
        terms.bends.push_back(j);
        terms.read.wide.push_back(all.wide[j]), terms.read.narrow.push_back(all.narrow[j]);
      }
    return terms;
  }
};

bool past_caches(const std::vector<Tensor>& outputs) {
  size_t bytes = 0;
  for (const Tensor& t : outputs) bytes += t.nbytes();
  return bytes >= kLargeList;
}

void sum_double(const void* const* bends, const double* coefficients, int64_t count, double* out, int64_t begin,
                int64_t n) {
  for (int64_t i = begin; i < begin + n; ++i) {
    const auto bend = [&](int64_t j) { return static_cast<const double*>(bends[j])[i]; };
    double total = count ? curve_first(bend(0), coefficients[0]) : 0;
    for (int64_t j = 1; j < count; ++j) total = curve_next(total, bend(j), coefficients[j]);
    out[i] = total;
  }
}

// Elements of a chunk of `out`; the coefficients are those of its bends.
void sum_chunk(const Tensor& out, const void* const* bends, int64_t count, const double* wide, const float* narrow,
               bool past, const Chunk& chunk) {
  if (out.scalar_type() == at::kDouble)
    return sum_double(bends, wide, count, out.mutable_data_ptr<double>(), chunk.begin, chunk.n);
  kernels().curve_sum({bends, narrow, count, dtype_of(out), array_of(out, chunk.begin), past}, chunk.begin, chunk.n);
}

std::vector<Tensor> curve_weights_cpu(at::TensorList bends, const Tensor& coefficients) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const size_t size = check_curve_weights(bends, coefficients);
  const Coefficients all = Coefficients::of(coefficients);
  const Terms wide = Terms::of(all, /*is_double=*/true), narrow = Terms::of(all, /*is_double=*/false);
  const auto terms_of = [&](const Tensor& out) -> const Terms& {
    return out.scalar_type() == at::kDouble ? wide : narrow;
  };
  std::vector<Layout> layouts;
  layouts.reserve(size);
  for (size_t p = 0; p < size; ++p) layouts.push_back(Layout::like(bends[p]));
  std::vector<Tensor> out = empty_together(layouts), copies;
  const size_t count = all.wide.size();
  std::vector<const void*> sources(size * count);  // [P, bends that are read]
  for (size_t p = 0; p < size; ++p) {
    const void** source = &sources[p * count];
    for (const size_t j : terms_of(out[p]).bends) {
      const Tensor& bend = bends[j * size + p];
      if (!layouts[p].is_of(bend)) copies.push_back(layouts[p].arrange(bend));
      *source++ = (layouts[p].is_of(bend) ? bend : copies.back()).const_data_ptr();
    }
  }
  const bool past = past_caches(out);
  for_chunks(chunks_of(out, kChunk), 1, [&](const Chunk& chunk, int64_t) {
    const size_t p = chunk.index;
    const Terms& terms = terms_of(out[p]);
    sum_chunk(out[p], &sources[p * count], terms.bends.size(), terms.read.wide.data(), terms.read.narrow.data(), past,
              chunk);
  });
  return out;
}

double product_double(int64_t n, const double* grad, const double* bend) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum = curve_dot(sum, grad[i], bend[i]);
  return sum;
}

std::vector<Tensor> curve_weights_backward_cpu(at::TensorList grads_in, at::TensorList bends_in,
                                               const Tensor& coefficients, const c10::List<bool>& needed,
                                               bool need_coefficients) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const size_t size =
      check_curve_weights_backward(grads_in, bends_in, coefficients, needed.size(), need_coefficients);
  const Coefficients all = Coefficients::of(coefficients);
  const size_t count = all.wide.size();
  std::vector<Layout> layouts, wanted;
  layouts.reserve(size), wanted.reserve(needed.size());
  for (size_t p = 0; p < size; ++p) layouts.push_back(Layout::like(bends_in.empty() ? grads_in[p] : bends_in[p]));
  std::vector<int64_t> places(needed.size(), -1);  // of a bend's gradient in the result
  for (size_t i = 0; i < needed.size(); ++i)
    if (needed[i]) {
      places[i] = static_cast<int64_t>(wanted.size());
      wanted.push_back(layouts[i % size]);
    }
  std::vector<Tensor> result = empty_together(wanted), grads, bends;
  grads.reserve(size);
  for (size_t p = 0; p < size; ++p) grads.push_back(layouts[p].arrange(grads_in[p]));
  if (need_coefficients)
    for (size_t i = 0; i < bends_in.size(); ++i) bends.push_back(layouts[i % size].arrange(bends_in[i]));

  const bool past = past_caches(result);
  const std::vector<Chunk> chunks = chunks_of(grads, kChunk);
  std::vector<double> products(chunks.size() * bends.size() / std::max<size_t>(size, 1));  // [chunks, K]
  for_chunks(chunks, 1, [&](const Chunk& chunk, int64_t number) {
    const size_t p = chunk.index;
    const void* grad = grads[p].const_data_ptr();
    for (size_t j = 0; j < count; ++j) {
      const size_t i = j * size + p;
      if (places[i] >= 0) sum_chunk(result[places[i]], &grad, 1, &all.wide[j], &all.narrow[j], past, chunk);
      if (!need_coefficients) continue;
      double& product = products[number * count + j];
      if (grads[p].scalar_type() == at::kDouble)
        product = product_double(chunk.n, grads[p].const_data_ptr<double>() + chunk.begin,
                                 bends[i].const_data_ptr<double>() + chunk.begin);
      else
        product = kernels().curve_product(chunk.n, array_of(grads[p], chunk.begin), array_of(bends[i], chunk.begin));
    }
  });
  if (need_coefficients) {
    const Tensor sums = at::zeros({static_cast<int64_t>(count)}, at::kDouble);
    double* sum = sums.mutable_data_ptr<double>();
    for (size_t k = 0; k < products.size(); ++k) sum[k % count] += products[k];
    result.push_back(sums.to(coefficients.scalar_type()));
  }
  return result;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("curve_weights", &losssurf::curve_weights_cpu);
  m.impl("curve_weights_backward", &losssurf::curve_weights_backward_cpu);
}
