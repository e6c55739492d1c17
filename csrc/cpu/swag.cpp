// CPU kernels of SWAG: ops/swag.py has the contract. One parallel region covers a whole model's tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../averaging_math.h"
#include "../swag_checks.h"
#include "tiles.h"

namespace losssurf {
namespace {

using at::Tensor;

constexpr int64_t kChunk = 4 * kTile;      // elements of a kernel call

// ---- collecting -------------------------------------------------------------------------------------------

void collect_double(double weight, bool first, int64_t n, double* mean, double* m2, const double* value,
                    double* deviation) {
  for (int64_t i = 0; i < n; ++i) {
    const Moments<double> next = welford_element(mean[i], m2[i], value[i], weight, first);
    mean[i] = next.mean, m2[i] = next.m2;
    if (deviation) deviation[i] = next.deviation;
  }
}

void swag_collect_cpu(at::TensorList mean, at::TensorList m2, at::TensorList deviations, at::TensorList values_in,
                      int64_t n) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_swag_collect(mean, m2, deviations, values_in, n);
  std::vector<Tensor> values;  // contiguous, in fp64 beside an fp64 mean
  for (size_t i = 0; i < mean.size(); ++i) {
    const bool wide = mean[i].scalar_type() == at::kDouble || values_in[i].scalar_type() == at::kDouble;
    values.push_back((wide ? values_in[i].to(mean[i].scalar_type()) : values_in[i]).contiguous());
  }
  const auto kernel = kernels().swag_collect;
  const double weight = 1 / (static_cast<double>(n) + 1);
  for_chunks(chunks_of(mean, kChunk), 1, [&](Chunk chunk, int64_t) {
    const auto [index, begin, count] = chunk;
    const Tensor &a = mean[index], &b = m2[index], &v = values[index];
    // the row n mod K of the ring buffer
    const Tensor slots = deviations.empty() ? Tensor() : deviations[index];
    const int64_t place = deviations.empty() ? 0 : n % slots.size(0) * slots.size(1) + begin;
    if (a.scalar_type() == at::kDouble) {
      collect_double(weight, n == 0, count, a.data_ptr<double>() + begin, b.data_ptr<double>() + begin,
                     v.const_data_ptr<double>() + begin,
                     deviations.empty() ? nullptr : slots.data_ptr<double>() + place);
      return;
    }
    kernel(static_cast<float>(weight), n == 0, count, a.data_ptr<float>() + begin, b.data_ptr<float>() + begin,
           array_of(v, begin), deviations.empty() ? Array{} : array_of(slots, place));
  });
}

// ---- sampling ---------------------------------------------------------------------------------------------

// Normals of one row times `factor`: [samples, held]
template <class T>
std::vector<T> draw_coefficients(NoiseStream noise, int64_t row, int64_t samples, int64_t held, double factor) {
  std::vector<float> z(held);
  std::vector<T> coefficients;
  noise.row_offset = row;
  for (int64_t s = 0; held && s < samples; ++s, ++noise.sample) {
    kernels().philox_normal(noise, Tile{0, 1, 0, held}, Matrix{z.data(), held, DType::f32});
    for (const float x : z) coefficients.push_back(x * static_cast<T>(factor));
  }
  return coefficients;
}

// One tensor of the list: the kernel's arguments, and what they point to. Where mean is fp64, p's pointers are null.
struct Parameter {
  SwagParameter p;
  Tensor mean, m2, columns, out;  // all contiguous
  std::vector<float> coefficients;
  std::vector<double> wide_coefficients;
};

// Elements [begin, begin + n) of all samples, in fp64.
void sample_double(const Parameter& parameter, double variance_scale, int64_t begin, int64_t n) {
  const SwagParameter& p = parameter.p;
  const int64_t numel = parameter.mean.numel();
  const double *mean = parameter.mean.const_data_ptr<double>(), *m2 = parameter.m2.const_data_ptr<double>();
  const double* columns = p.rank ? parameter.columns.const_data_ptr<double>() : nullptr;
  std::vector<float> z(n);
  for (int64_t s = 0; s < p.samples; ++s) {
    for (int64_t i = begin, count; i < begin + n; i += count) {
      count = std::min(p.run - i % p.run, begin + n - i);
      NoiseStream noise = p.noise;
      noise.sample += s, noise.col_offset += i / p.run * p.stride + i % p.run;
      kernels().philox_normal(noise, Tile{0, 1, 0, count}, Matrix{z.data() + (i - begin), count, DType::f32});
    }
    double* out = parameter.out.data_ptr<double>() + s * numel;
    const double* c = parameter.wide_coefficients.data() + s * p.rank;
    for (int64_t i = begin; i < begin + n; ++i) {
      double low_rank = 0;
      for (int64_t j = 0; j < p.rank; ++j) low_rank = c[j] * columns[j * numel + i] + low_rank;
      out[i] = swag_element<double>(mean[i], m2[i], z[i - begin], low_rank, variance_scale);
    }
  }
}

void swag_sample_cpu(at::TensorList out, at::TensorList mean, at::TensorList m2, at::TensorList deviations,
                     const Tensor& seed, int64_t n, double scale, bool cov, bool block, int64_t sample,
                     int64_t num_samples, at::IntArrayRef places, int64_t num_params) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_swag_sample(out, mean, m2, deviations, n, num_samples, places);
  const NoiseStream noise = noise_stream(seed, 0, 0, sample);
  const int64_t held = deviations.empty() ? 0 : std::min(n, deviations[0].size(0)), rank = cov && held > 1 ? held : 0;
  const double factor = rank ? std::sqrt(scale / (rank - 1)) : 0, variance_scale = scale / n;
  const auto draw = [&](auto type, int64_t row) {
    return draw_coefficients<decltype(type)>(noise, row, num_samples, rank, factor);
  };
  const auto shared = draw(0.0f, num_params);
  const auto shared_wide = draw(0.0, num_params);

  std::vector<Parameter> parameters(mean.size());
  int64_t bytes = 0;
  for (const Tensor& o : out) bytes += o.nbytes();
  for (size_t i = 0; i < mean.size(); ++i) {
    Parameter& parameter = parameters[i];
    const bool wide = mean[i].scalar_type() == at::kDouble, wide_out = out[i].scalar_type() == at::kDouble;
    const at::IntArrayRef place = places.slice(4 * i, 4);
    const int64_t numel = mean[i].numel(), block_row = num_params + 1 + place[0];
    parameter.mean = mean[i], parameter.m2 = m2[i];
    if (rank) parameter.columns = deviations[i];
    const bool direct = out[i].is_contiguous() && wide == wide_out;
    const auto dtype = wide ? at::kDouble : wide_out ? at::kFloat : out[i].scalar_type();
    parameter.out = direct ? out[i] : at::empty({num_samples, numel}, out[i].options().dtype(dtype));
    if (wide) parameter.wide_coefficients = block ? draw(0.0, block_row) : shared_wide;
    else if (block) parameter.coefficients = draw(0.0f, block_row);

    SwagParameter& p = parameter.p;
    p = {};
    p.noise = noise;
    p.noise.row_offset = place[0], p.noise.col_offset = place[1];
    p.run = std::max<int64_t>(1, place[2]), p.stride = place[3];
    p.rank = rank, p.samples = num_samples;
    if (wide) continue;
    p.mean = mean[i].const_data_ptr<float>(), p.m2 = m2[i].const_data_ptr<float>();
    if (rank) p.columns = matrix_of(deviations[i], numel);
    p.coefficients = (block ? parameter.coefficients : shared).data();
    p.variance_scale = static_cast<float>(variance_scale);
    p.out = matrix_of(parameter.out, numel);
    p.past_caches = bytes >= kLargeOutput;
  }
  const auto kernel = kernels().swag_sample;
  for_chunks(chunks_of(mean, kChunk), 1, [&](Chunk chunk, int64_t) {
    const Parameter& parameter = parameters[chunk.index];
    if (parameter.mean.scalar_type() == at::kDouble) sample_double(parameter, variance_scale, chunk.begin, chunk.n);
    else kernel(parameter.p, chunk.begin, chunk.n);
  });
  for (size_t i = 0; i < out.size(); ++i)
    if (!parameters[i].out.is_same(out[i])) out[i].copy_(parameters[i].out.view(out[i].sizes()));
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("swag_collect_", &losssurf::swag_collect_cpu);
  m.impl("swag_sample_", &losssurf::swag_sample_cpu);
}
