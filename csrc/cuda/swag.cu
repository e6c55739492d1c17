// swag_collect_ and swag_sample as CUDA kernels over a model's tensors, on the same averaging_math.h and philox.h as
// the CPU.
#include "swag.h"

#include "../averaging_math.h"
#include "../philox.h"
#include "float_type.cuh"
#include "multi_tensor.cuh"

namespace {

// ---- collect --------------------------------------------------------------------------------------------------

template <class F, class D, class V> struct Collect {
  static constexpr int kPack = 16 / (sizeof(F) > sizeof(V) ? sizeof(F) : sizeof(V));
  F weight;  // 1 / (n + 1)
  bool first;

  __device__ void operator()(const CollectTensors& row, int64_t begin, int n, int thread) const {
    F* means = static_cast<F*>(row.mean) + begin;
    F* m2s = static_cast<F*>(row.m2) + begin;
    const V* values = static_cast<const V*>(row.value) + begin;
    const bool packs = aligned(row.mean) && aligned(row.m2) && aligned(row.value) && aligned(row.deviation);
    for_packs<kPack>(packs, n, thread, [&](int i, auto width) {
      constexpr int N = width.value;
      F value[N], mean[N] = {}, m2[N] = {}, deviation[N];
      load_pack(values + i, value);
      if (!first) {
        load_pack(means + i, mean);
        load_pack(m2s + i, m2);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const Moments<F> next = welford_element(mean[e], m2[e], value[e], weight, first);
        mean[e] = next.mean, m2[e] = next.m2, deviation[e] = next.deviation;
      }
      store_pack(mean, means + i);
      store_pack(m2, m2s + i);
      if (row.deviation) store_pack(deviation, static_cast<D*>(row.deviation) + begin + i);
    });
  }
};

template <class F, class D, class V>
void collect(const CollectTensors* tensors, int64_t num_tensors, int64_t n, cudaStream_t stream) {
  const Collect<F, D, V> functor = {static_cast<F>(1.0 / (n + 1.0)), n == 0};
  typedef Table<CollectTensors, 8192> Rows;
  const auto row_of = [&](int64_t i) { return tensors[i]; };
  for_tables<Rows>(num_tensors, row_of, [&](const Rows& table) {
    launch(multi_tensor<Rows, Collect<F, D, V>>, blocks_for(table.chunks()), stream, table, functor);
  });
}

// ---- sample ---------------------------------------------------------------------------------------------------

constexpr int kWidth = 4;  // elements of a thread: a quad of columns, where they lie in the noise as in memory
constexpr int kCoefficientBytes = 16384;
template <class F> constexpr int kGroup = 32 / sizeof(F);  // samples whose low-rank parts are in registers together
template <class F> constexpr int kCoefficients = kCoefficientBytes / sizeof(F);

// Columns of kWidth neighbours in memory: often one quad, but a place's offset and its runs may split them.
struct Columns {
  uint32_t quad[kWidth];
  int lane[kWidth];

  LSF_INLINE Columns(const SampleTensors& t, int64_t i) {
    const bool one_run = t.run >= t.numel;
    int64_t column = t.offset + (one_run ? i : i / t.run * t.stride + i % t.run);
    int64_t left = one_run ? kWidth : t.run - i % t.run;  // in this run
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      quad[e] = static_cast<uint32_t>(column >> 2), lane[e] = static_cast<int>(column & 3);
      ++column;
      if (--left == 0) column += t.stride - t.run, left = t.run;
    }
  }

  // Their normals, quad after quad.
  LSF_INLINE void draw(const PhiloxKey& key, int64_t row, uint32_t sample, float (&z)[kWidth]) const {
    uint32_t next = quad[0];
    bool more = true;
#pragma unroll 1
    while (more) {
      const uint32_t now = next;
      float normal[4];
      normal_quad(key, now, row, sample, normal);
      more = false;
#pragma unroll
      for (int e = kWidth - 1; e >= 0; --e) {
        const float low = lane[e] & 1 ? normal[1] : normal[0], high = lane[e] & 1 ? normal[3] : normal[2];
        if (quad[e] == now) z[e] = lane[e] & 2 ? high : low;
        if (quad[e] > now) next = quad[e], more = true;
      }
    }
  }
};

template <class F>
LSF_INLINE void store(const F (&x)[kWidth], FloatType type, void* out, int64_t i, bool packs, int64_t left) {
  switch (type) {
    case FloatType::f64: return stream_some(x, static_cast<double*>(out) + i, packs, left);
    case FloatType::f32: return stream_some(x, static_cast<float*>(out) + i, packs, left);
    case FloatType::bf16: return stream_some(x, static_cast<__nv_bfloat16*>(out) + i, packs, left);
    case FloatType::f16: return stream_some(x, static_cast<__half*>(out) + i, packs, left);
  }
}

template <class F> struct Sample {
  SampleOptions options;
  F variance_scale, coefficient;
  FloatType out;
  int64_t skip;  // samples of `out` before the first one of this launch
};

// z2 times coefficient for every sample and column, as [group of samples][column][sample of the group].
template <class F, int Group>
LSF_INLINE void draw_coefficients(const Sample<F>& s, const PhiloxKey& key, int64_t row, F* coefficients) {
  const int rank = s.options.rank, quads = (rank + 3) / 4, samples = static_cast<int>(s.options.samples);
  for (int i = threadIdx.x; i < quads * samples; i += kThreads) {
    const int quad = i % quads, sample = i / quads;
    float z[4];
    normal_quad(key, quad, row, s.options.first_sample + sample, z);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (4 * quad + e < rank)
        coefficients[(sample / Group * rank + 4 * quad + e) * Group + sample % Group] = F(z[e]) * s.coefficient;
  }
}

typedef Table<SampleTensors, kThreads * kWidth> SampleTable;

// A block reads its piece of the deviations once for each Group of samples: from memory the first time, from the caches
// after that.
template <class F, class D, int Group>
__global__ void __launch_bounds__(kThreads)
    swag_sample(const __grid_constant__ SampleTable table, const __grid_constant__ Sample<F> s) {
  static_assert(sizeof table + sizeof s <= kArguments);
  alignas(16) __shared__ F coefficients[kCoefficients<F>];
  const SampleOptions& options = s.options;
  const int rank = options.rank, samples = static_cast<int>(options.samples);
  const PhiloxKey key = PhiloxKey::of(*options.seed);
  int64_t drawn = -1;  // row of the noise that the coefficients are from

  for_chunks(table, blockIdx.x, gridDim.x, [&](const SampleTensors& t, int64_t first, int) {
    const int64_t z2_row = options.num_params + (options.block ? 1 + t.row : 0);
    if (rank > 0 && z2_row != drawn) {
      __syncthreads();
      draw_coefficients<F, Group>(s, key, z2_row, coefficients);
      __syncthreads();
      drawn = z2_row;
    }

    const int64_t i = first + threadIdx.x * kWidth, numel = t.numel, left = numel - i;
    if (left <= 0) return;
    const bool packs =
        numel % kWidth == 0 && aligned(t.mean) && aligned(t.m2) && aligned(t.deviations) && aligned(t.out);
    const Columns columns(t, i);
    const D* deviations = static_cast<const D*>(t.deviations) + i;
    F mean[kWidth], m2[kWidth];
    load_some(static_cast<const F*>(t.mean) + i, packs, left, mean);
    load_some(static_cast<const F*>(t.m2) + i, packs, left, m2);

#pragma unroll 1
    for (int begin = 0; begin < samples; begin += Group) {
      F low_rank[Group][kWidth] = {};
      const F* c = coefficients + begin * rank;
      constexpr int kAhead = 4;  // rows of deviations that are loaded together
#pragma unroll 1
      for (int j = 0; j < rank; j += kAhead) {
        F row[kAhead][kWidth];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (j + k < rank) load_some(deviations + (j + k) * numel, packs, left, row[k]);
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (j + k < rank)
#pragma unroll
            for (int g = 0; g < Group; ++g)
#pragma unroll
              for (int e = 0; e < kWidth; ++e)
                low_rank[g][e] = fused_mul_add(c[(j + k) * Group + g], row[k][e], low_rank[g][e]);
      }
#pragma unroll 1
      for (int g = 0; g < Group && begin + g < samples; ++g) {
        float z[kWidth];
        columns.draw(key, t.row, options.first_sample + begin + g, z);
        F weight[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          weight[e] = swag_element(mean[e], m2[e], F(z[e]), low_rank[0][e], s.variance_scale);
        store(weight, s.out, t.out, (s.skip + begin + g) * numel + i, packs, left);
#pragma unroll
        for (int k = 1; k < Group; ++k)  // registers have no index: the next sample's move up
#pragma unroll
          for (int e = 0; e < kWidth; ++e) low_rank[k - 1][e] = low_rank[k][e];
      }
    }
  });
}

template <class F, class D>
void sample(FloatType out, const SampleTensors* tensors, int64_t num_tensors, const SampleOptions& options,
            cudaStream_t stream) {
  Sample<F> s = {options, static_cast<F>(options.variance_scale), static_cast<F>(options.coefficient), out, 0};
  const int64_t fit = kCoefficients<F> / (options.rank > 0 ? options.rank : 1);  // samples of a launch
  const bool groups = options.samples > 1 && fit >= kGroup<F>;
  const int64_t most = groups ? fit / kGroup<F> * kGroup<F> : fit;
  const auto row_of = [&](int64_t i) { return tensors[i]; };
  for_tables<SampleTable>(num_tensors, row_of, [&](const SampleTable& table) {
    for (int64_t done = 0; done < options.samples; done += most) {
      s.skip = done;
      s.options.first_sample = options.first_sample + static_cast<uint32_t>(done);
      s.options.samples = options.samples - done < most ? options.samples - done : most;
      // few blocks, each of which draws its coefficients once
      const unsigned blocks = blocks_for(table.chunks(), 2048);
      if (groups) launch(swag_sample<F, D, kGroup<F>>, blocks, stream, table, s);
      else launch(swag_sample<F, D, 1>, blocks, stream, table, s);
    }
  });
}

}  // namespace

extern "C" void losssurf_swag_collect(FloatType mean, FloatType deviation, FloatType value,
                                      const CollectTensors* tensors, int64_t num_tensors, int64_t n,
                                      cudaStream_t stream) {
  with_type(value, [&](auto v) {
    using V = typename decltype(v)::type;
    if (mean == FloatType::f64) return collect<double, double, V>(tensors, num_tensors, n, stream);
    with_type(deviation, [&](auto d) {
      using D = typename decltype(d)::type;
      if constexpr (sizeof(D) < sizeof(double)) collect<float, D, V>(tensors, num_tensors, n, stream);
    });
  });
}

extern "C" int64_t losssurf_swag_max_rank(FloatType mean) {
  return mean == FloatType::f64 ? kCoefficients<double> : kCoefficients<float>;
}

extern "C" void losssurf_swag_sample(FloatType mean, FloatType deviations, FloatType out, const SampleTensors* tensors,
                                     int64_t num_tensors, const SampleOptions* options, cudaStream_t stream) {
  if (mean == FloatType::f64) return sample<double, double>(out, tensors, num_tensors, *options, stream);
  with_type(deviations, [&](auto d) {
    using D = typename decltype(d)::type;
    if constexpr (sizeof(D) < sizeof(double)) sample<float, D>(out, tensors, num_tensors, *options, stream);
  });
}
