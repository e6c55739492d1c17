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

namespace losssurf {
namespace {

using at::Tensor;
using Names = c10::List<std::string>;

constexpr int64_t kChunk = kTile;  // elements of a kernel call, and of a sum in double precision

// ---- what a call is about -----------------------------------------------------------------------------------

// One tensor of weights, its parameters contiguous.
struct Entry {
  Tensor weight, scale;  // weight is undefined where the means are 0
  std::string parameterization;
  GaussianTensor view;
  int64_t numel() const { return like().numel(); }
  const Tensor& like() const { return weight.defined() ? weight : scale; }
  bool wide() const { return scale.scalar_type() == at::kDouble; }
  int64_t covered() const { return numel() / std::max<int64_t>(1, scale.numel()); }  // weights of an element of scale
  bool shared() const { return parameterization == "layer" || parameterization == "neuron"; }
};

struct PriorOf {
  bool given;
  KL kind;
  double std;
  PriorOf(c10::string_view name, double std) : given(name != "none"), kind(KL::normal), std(std) {
    if (name == "log_uniform") kind = KL::log_uniform;
    else if (name == "log_uniform_approximate") kind = KL::log_uniform_approximate;
    else if (name == "ard") kind = KL::ard;
    else TORCH_CHECK_VALUE(!given || name == "normal", "gaussian_weights: unknown prior '", name, "'");
  }
  bool scale_free() const { return kind != KL::normal; }  // the KL is a function of log_alpha
  Prior kernel() const { return {static_cast<float>(1 / std), static_cast<float>(2 * std::log(std))}; }
};

std::vector<Entry> entries_of(at::TensorList weights, at::TensorList scales, const Names& parameterizations,
                              const Tensor& seed, int64_t row_offset, int64_t sample, const PriorOf& prior) {
  TORCH_CHECK_VALUE(parameterizations.size() == scales.size(), "gaussian_weights: parameterizations must hold ",
                    scales.size(), " names like scales, got ", parameterizations.size());
  std::vector<Entry> entries;
  size_t next = 0;
  for (size_t i = 0; i < scales.size(); ++i) {
    Entry entry{{}, scales[i].contiguous(), parameterizations.get(i), {}};
    if (entry.parameterization != "variance") {
      TORCH_CHECK_VALUE(next < weights.size(), "gaussian_weights: weights must hold a tensor for each scale but those of "
                        "'variance', got ", weights.size());
      entry.weight = weights[next++].contiguous();
    }
    const int64_t numel = entry.numel(), elements = entry.scale.numel();
    const int64_t rows = entry.like().dim() ? entry.like().size(0) : 1;
    const int64_t wanted = entry.parameterization == "layer" ? 1 : entry.parameterization == "neuron" ? rows : numel;
    TORCH_CHECK_VALUE(elements == wanted, "gaussian_weights: scales[", i, "] must have ", wanted, " elements, got ",
                      elements);
    TORCH_CHECK_TYPE(entry.wide() == (entry.like().scalar_type() == at::kDouble),
                     "gaussian_weights: weights and scales must both be float64 or neither");
    GaussianTensor& view = entry.view;
    view.noise = noise_stream(seed, row_offset + static_cast<int64_t>(i), 0, sample);
    view.run = std::max<int64_t>(1, entry.covered());
    view.multiplicative = entry.weight.defined() && entry.parameterization != "additive";
    // Where it is a function of log_alpha, elements that weights share have their KL taken once (shared_kl), and
    // means of 0 have none.
    view.has_kl = prior.given && !(prior.scale_free() && (entry.shared() || !entry.weight.defined()));
    view.kl = prior.kind, view.prior = prior.kernel();
    if (!entry.wide()) {
      view.scale = array_of(entry.scale, 0);
      if (entry.weight.defined()) view.weight = array_of(entry.weight, 0);
    }
    entries.push_back(std::move(entry));
  }
  TORCH_CHECK_VALUE(next == weights.size(), "gaussian_weights: weights must hold ", next, " tensors, got ",
                    weights.size());
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

bool has_shared_kl(const Entry& entry, const PriorOf& prior) {
  return prior.given && prior.scale_free() && entry.shared();
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
    if (has_shared_kl(entry, prior)) total += entry.covered() * shared_kl(entry, prior, nullptr);
  const bool wide = std::any_of(entries.begin(), entries.end(), [](const Entry& entry) { return entry.wide(); });
  const Tensor kl = at::empty({}, seed.options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) *kl.data_ptr<double>() = total;
  else *kl.data_ptr<float>() = static_cast<float>(total);  // infinite past fp32's range
  return {out, kl};
}

// Sums over the weights that an element of scale covers, from a list of places for each chunk.
void finish_shared(const Entry& entry, const PriorOf& prior, double grad_kl, std::vector<double>& sums,
                   const Tensor& out) {
  if (has_shared_kl(entry, prior)) {
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
  TORCH_CHECK_VALUE(grads_in.size() == entries.size() && needed.size() == weights.size() + scales.size(),
                    "gaussian_weights_backward: grads must hold ", entries.size(), " tensors and needed ",
                    weights.size() + scales.size(), " flags, got ", grads_in.size(), " and ", needed.size());
  const double grad_kl = grad_kl_in.item<double>();

  // Gradients, those of weights first; undefined ones are not wanted.
  std::vector<Layout> layouts;
  std::vector<const Tensor*> parameters;
  for (const Entry& entry : entries)
    if (entry.weight.defined()) parameters.push_back(&entry.weight);
  for (const Entry& entry : entries) parameters.push_back(&entry.scale);
  for (size_t i = 0; i < parameters.size(); ++i)
    if (needed.get(i)) layouts.push_back(Layout::like(*parameters[i]));
  const std::vector<Tensor> results = empty_together(layouts);
  std::vector<Tensor> grad_weights(entries.size()), grad_scales(entries.size()), grads;
  size_t result = 0, flag = 0;
  for (size_t i = 0; i < entries.size(); ++i)
    if (entries[i].weight.defined() && needed.get(flag++)) grad_weights[i] = results[result++];
  for (size_t i = 0; i < entries.size(); ++i)
    if (needed.get(flag++)) grad_scales[i] = results[result++];

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
  for (size_t i = 0; i < entries.size(); ++i) {
    const Tensor& grad = grads_in[i];
    TORCH_CHECK_VALUE(grad.sizes() == likes[i].sizes(), "gaussian_weights_backward: grads[", i, "] must have shape ",
                      likes[i].sizes(), ", got ", grad.sizes());
    TORCH_CHECK_TYPE(entries[i].wide() == (grad.scalar_type() == at::kDouble),
                     "gaussian_weights_backward: grads[", i, "] must be float64 where its weight is, got ",
                     grad.scalar_type());
    grads.push_back(grad.contiguous());
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
