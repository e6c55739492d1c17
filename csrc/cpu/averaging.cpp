// CPU kernels of lerp_ and ema_: ops/averaging.py has the contract. One parallel region covers a whole model's tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "../averaging_checks.h"
#include "../averaging_math.h"
#include "tiles.h"

namespace losssurf {
namespace {

using at::Tensor;

constexpr int64_t kChunk = 2 * kTile;  // a value and an average of it stay in L1

void average_double(const Tensor& average, const Tensor& value, double weight) {
  const bool in_place = average.scalar_type() == at::kDouble && average.is_contiguous();
  const Tensor a = in_place ? average : average.to(at::kDouble).contiguous(), v = value.to(at::kDouble).contiguous();
  double* out = a.mutable_data_ptr<double>();
  const double* in = v.const_data_ptr<double>();
  const auto w = LerpWeightIn<double>::of(weight);
  at::parallel_for(0, a.numel(), 8 * kTile, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = lerp_element(out[i], in[i], w);
  });
  if (!in_place) average.copy_(a);
}

// averages[k P + i] <- lerp(averages[k P + i], values[i], weights[k]) for P values
void average(at::TensorList averages, at::TensorList values, at::ArrayRef<double> weights) {
  const size_t size = values.size();
  // What the kernel walks through in memory: tensors in one order, copies where the given ones are not.
  std::vector<Tensor> targets(averages.begin(), averages.end()), sources;
  sources.reserve(averages.size());
  for (size_t i = 0; i < averages.size(); ++i) {
    const Tensor& value = values[i % size];
    if (averages[i].scalar_type() == at::kDouble || value.scalar_type() == at::kDouble) {
      average_double(averages[i], value, weights[i / size]);
      sources.emplace_back();
      continue;
    }
    Tensor& target = targets[i];
    if (!target.is_contiguous() && !target.is_non_overlapping_and_dense()) target = target.contiguous();
    const bool same_order = value.strides() == target.strides();
    sources.push_back(same_order ? value
                                 : at::empty_strided(target.sizes(), target.strides(), value.options()).copy_(value));
  }

  const auto kernel = kernels().lerp;
  for_chunks(chunks_of(values, kChunk), 4, [&](Chunk chunk, int64_t) {
    const auto [index, begin, n] = chunk;
    for (size_t k = 0, i = index; k < weights.size(); ++k, i += size)
      if (sources[i].defined()) kernel(weights[k], n, array_of(sources[i], begin), array_of(targets[i], begin));
  });
  for (size_t i = 0; i < averages.size(); ++i)
    if (!targets[i].is_same(averages[i])) averages[i].copy_(targets[i]);
}

void lerp_cpu(at::TensorList averages, at::TensorList values, double weight) {
  check_lerp("lerp_", averages, values, 1);
  average(averages, values, weight);
}

void ema_cpu(at::TensorList averages, at::TensorList values, at::ArrayRef<double> decays) {
  check_lerp("ema_", averages, values, decays.size());
  std::vector<double> weights;
  for (const double decay : decays) weights.push_back(1 - decay);
  average(averages, values, weights);
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("lerp_", &losssurf::lerp_cpu);
  m.impl("ema_", &losssurf::ema_cpu);
}
