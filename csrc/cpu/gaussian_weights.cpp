// CPU kernels of the gaussian_weights family: ops/gaussian_weights.py has the contract. One parallel region covers a
// whole model's tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "arena.h"
#include "kl.h"
#include "tiles.h"

#include "../gaussian_checks.h"

namespace losssurf {
namespace {

using at::Tensor;

constexpr int64_t kChunk = kTile;  // elements of a kernel call, and of a sum in double precision

// An entry as the kernels see it.
struct Entry : GaussianEntry {
  GaussianTensor view;
};

std::vector<Entry> entries_of(at::TensorList weights, at::TensorList scales, const Names& parameterizations,
                              const Tensor& seed, int64_t row_offset, int64_t sample, const PriorOf& prior) {
  std::vector<Entry> entries;
  for (GaussianEntry& found : gaussian_entries(weights, scales, parameterizations, seed)) {
    Entry entry{std::move(found), {}};
    GaussianTensor& view = entry.view;
    view.noise = noise_stream(seed, row_offset + static_cast<int64_t>(entries.size()), 0, sample);
    view.run = entry.run();
    view.multiplicative = entry.multiplicative();
    view.has_kl = prior.of_weights(entry);
    view.kl = prior.kind, view.prior = prior.kernel();
    if (!entry.wide()) {
      view.scale = array_of(entry.scale, 0);
      if (entry.weight.defined()) view.weight = array_of(entry.weight, 0);
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

std::vector<Tensor> likes_of(const std::vector<Entry>& entries) {
  std::vector<Tensor> likes;
  for (const Entry& entry : entries) likes.push_back(entry.like());
  return likes;
}

// ---- fp64 -----------------------------------------------------------------------------------------------------

const double kLeastWeight = 0x1p-511;  // in magnitude; its square is the least normal number

// What a pass reads of elements [begin, begin + n), n <= kChunk.
struct DoublePiece {
  double eps[kChunk], sigma[kChunk], log_variance[kChunk];
  const double* weight;  // may be null

  DoublePiece(const Entry& entry, int64_t begin, int64_t n) {
    float noise[kChunk];
    NoiseStream stream = entry.view.noise;
    stream.col_offset += begin;
    kernels().philox_normal(stream, Tile{0, 1, 0, n}, Matrix{noise, n, DType::f32});
    const double* scale = entry.scale.const_data_ptr<double>();
    weight = entry.weight.defined() ? entry.weight.const_data_ptr<double>() + begin : nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const double s = scale[(begin + i) / entry.view.run];
      eps[i] = noise[i];
      sigma[i] = std::exp(0.5 * s);
      const bool relative = entry.view.multiplicative && entry.view.kl == KL::normal;
      log_variance[i] = relative ? s + 2 * std::log(std::max(kLeastWeight, std::abs(weight[i]))) : s;
    }
  }
  // The weight that the KL is taken with.
  const double* kl_weight(const GaussianTensor& view) const {
    return view.kl == KL::normal || !view.multiplicative ? weight : nullptr;
  }
};

double draw_double(const Entry& entry, double prior_std, int64_t begin, int64_t n, double* out) {
  const DoublePiece piece(entry, begin, n);
  for (int64_t i = 0; i < n; ++i) {
    const double mean = piece.weight ? piece.weight[i] : 0, factor = entry.view.multiplicative ? mean : 1;
    out[i] = mean + factor * piece.sigma[i] * piece.eps[i];
  }
  if (!entry.view.has_kl) return 0;
  return kl_sum_double(entry.view.kl, prior_std, n, piece.log_variance, piece.kl_weight(entry.view), nullptr, nullptr);
}

void backward_double(const Entry& entry, double prior_std, int64_t begin, int64_t n, const double* grad, double grad_kl,
                     double* grad_weight, double* grad_scale, double* sums) {
  const DoublePiece piece(entry, begin, n);
  const GaussianTensor& view = entry.view;
  double slope[kChunk] = {}, weight_slope[kChunk] = {};
  const double* kl_weight = piece.kl_weight(view);
  if (view.has_kl) kl_sum_double(view.kl, prior_std, n, piece.log_variance, kl_weight, slope, weight_slope);
  for (int64_t i = 0; i < n; ++i) {
    const double w = view.multiplicative ? piece.weight[i] : 1, noise = piece.sigma[i] * piece.eps[i];
    double to_weight = weight_slope[i];
    if (view.has_kl && view.multiplicative && kl_weight && std::abs(w) > kLeastWeight) to_weight += 2 * slope[i] / w;
    const double scale_grad = 0.5 * grad[i] * w * noise + grad_kl * slope[i];
    if (grad_weight) grad_weight[i] = grad[i] * (view.multiplicative ? 1 + noise : 1) + grad_kl * to_weight;
    if (grad_scale) grad_scale[i] = scale_grad;
    if (sums) sums[(begin + i) / view.run - begin / view.run] += scale_grad;
  }
}

// ---- operators --------------------------------------------------------------------------------------------------

// The KL of log_alpha elements that weights share, to a prior without a width; its slopes to them where not null.
double shared_kl(const Entry& entry, const PriorOf& prior, std::vector<double>* slopes) {
  const Tensor& scale = entry.scale;
  const int64_t numel = scale.numel();
  if (slopes) slopes->resize(numel);
  if (entry.wide())
    return kl_sum_double(prior.kind, prior.std, numel, scale.const_data_ptr<double>(), nullptr,
                         slopes ? slopes->data() : nullptr, nullptr);
  double sum = 0;
  float buffer[kTile];
  for (int64_t begin = 0; begin < numel; begin += kTile) {
    const int64_t n = std::min<int64_t>(kTile, numel - begin);
    const Array in[2] = {array_of(scale, begin), {}}, out[2] = {{buffer, DType::f32}, {}};
    sum += kernels().kl_sum(prior.kind, prior.kernel(), n, in, slopes ? out : nullptr);
    if (slopes) std::copy(buffer, buffer + n, slopes->begin() + begin);
  }
  return sum;
}

std::tuple<std::vector<Tensor>, Tensor> gaussian_weights_cpu(
    at::TensorList weights, at::TensorList scales, const Names& parameterizations, const Tensor& seed,
    int64_t row_offset, int64_t sample, c10::string_view prior_name, double prior_std) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const PriorOf prior(prior_name, prior_std);
  const auto entries = entries_of(weights, scales, parameterizations, seed, row_offset, sample, prior);
  const std::vector<Tensor> likes = likes_of(entries);
  std::vector<Layout> layouts;
  for (const Tensor& like : likes) layouts.push_back(Layout::like(like));
  const std::vector<Tensor> out = empty_together(layouts);
  const std::vector<Chunk> chunks = chunks_of(likes, kChunk);
  std::vector<double> sums(chunks.size());
  const auto kernel = kernels().gaussian_weights;
  for_chunks(chunks, 4, [&](Chunk chunk, int64_t i) {
    const auto [index, begin, n] = chunk;
    const Entry& entry = entries[index];
    if (entry.wide()) sums[i] = draw_double(entry, prior_std, begin, n, out[index].data_ptr<double>() + begin);
    else sums[i] = kernel(entry.view, begin, n, array_of(out[index], 0));
  });
  double total = 0;  // in the order of the chunks: the same bits for any number of threads
  for (const double sum : sums) total += sum;
  for (const Entry& entry : entries)
    if (prior.of_shared(entry)) total += entry.covered() * shared_kl(entry, prior, nullptr);
  const bool wide = any_wide(entries);
  const Tensor kl = at::empty({}, seed.options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) *kl.data_ptr<double>() = total;
  else *kl.data_ptr<float>() = static_cast<float>(total);  // infinite past fp32's range
  return {out, kl};
}

// Sums over the weights that an element of scale covers, from a list of places for each chunk.
void finish_shared(const Entry& entry, const PriorOf& prior, double grad_kl, std::vector<double>& sums,
                   const Tensor& out) {
  if (prior.of_shared(entry)) {
    std::vector<double> slopes;
    shared_kl(entry, prior, &slopes);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += grad_kl * entry.covered() * slopes[i];
  }
  Tensor wide = at::empty({static_cast<int64_t>(sums.size())}, out.options().dtype(at::kDouble));
  std::copy(sums.begin(), sums.end(), wide.data_ptr<double>());
  out.view(-1).copy_(wide);
}

std::vector<Tensor> gaussian_weights_backward_cpu(
    at::TensorList grads_in, const Tensor& grad_kl_in, at::TensorList weights, at::TensorList scales,
    const Names& parameterizations, const c10::List<bool>& needed, const Tensor& seed, int64_t row_offset,
    int64_t sample, c10::string_view prior_name, double prior_std) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const PriorOf prior(prior_name, prior_std);
  const auto entries = entries_of(weights, scales, parameterizations, seed, row_offset, sample, prior);
  const double grad_kl = grad_kl_in.item<double>();

  const std::vector<Tensor> grads = gaussian_grads(entries, grads_in, weights.size(), needed);
  const GaussianResults wanted = gaussian_results(entries, needed);
  std::vector<Layout> layouts;
  for (const Tensor& like : wanted.like) layouts.push_back(Layout::like(like));
  const std::vector<Tensor> results = empty_together(layouts);
  std::vector<Tensor> grad_weights, grad_scales;
  for (const int place : wanted.of_weight) grad_weights.push_back(result_at(results, place));
  for (const int place : wanted.of_scale) grad_scales.push_back(result_at(results, place));

  std::vector<Chunk> chunks;
  std::vector<size_t> places;  // of a chunk's sums over elements of scale
  size_t num_sums = 0;
  const std::vector<Tensor> likes = likes_of(entries);
  for (const Chunk chunk : chunks_of(likes, kChunk)) {
    const auto [index, begin, n] = chunk;
    if (!grad_weights[index].defined() && !grad_scales[index].defined()) continue;
    chunks.push_back(chunk);
    places.push_back(num_sums);
    const int64_t run = entries[index].view.run;
    if (entries[index].shared() && grad_scales[index].defined()) num_sums += (begin + n - 1) / run - begin / run + 1;
  }
  std::vector<double> sums(num_sums);
  const auto kernel = kernels().gaussian_weights_backward;
  for_chunks(chunks, 4, [&](Chunk chunk, int64_t i) {
    const auto [index, begin, n] = chunk;
    const Entry& entry = entries[index];
    const Tensor &to_weight = grad_weights[index], &to_scale = grad_scales[index];
    const bool summed = entry.shared() && to_scale.defined(), own = !entry.shared() && to_scale.defined();
    double* const chunk_sums = summed ? sums.data() + places[i] : nullptr;
    if (entry.wide())
      backward_double(entry, prior_std, begin, n, grads[index].const_data_ptr<double>() + begin, grad_kl,
                      to_weight.defined() ? to_weight.data_ptr<double>() + begin : nullptr,
                      own ? to_scale.data_ptr<double>() + begin : nullptr, chunk_sums);
    else
      kernel(entry.view, begin, n, array_of(grads[index], 0), static_cast<float>(grad_kl),
             to_weight.defined() ? array_of(to_weight, 0) : Array{}, own ? array_of(to_scale, 0) : Array{}, chunk_sums);
  });

  // In the order of the chunks.
  std::vector<std::vector<double>> totals(entries.size());
  for (size_t i = 0; i < entries.size(); ++i)
    if (entries[i].shared() && grad_scales[i].defined()) totals[i].resize(entries[i].scale.numel());
  for (size_t i = 0; i < chunks.size(); ++i) {
    const auto [index, begin, n] = chunks[i];
    if (totals[index].empty()) continue;
    const int64_t run = entries[index].view.run, first = begin / run;
    for (int64_t k = first; k <= (begin + n - 1) / run; ++k) totals[index][k] += sums[places[i] + k - first];
  }
  for (size_t i = 0; i < entries.size(); ++i)
    if (entries[i].shared() && grad_scales[i].defined())
      finish_shared(entries[i], prior, grad_kl, totals[i], grad_scales[i]);
  return results;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("gaussian_weights", &losssurf::gaussian_weights_cpu);
  m.impl("gaussian_weights_backward", &losssurf::gaussian_weights_backward_cpu);
}
