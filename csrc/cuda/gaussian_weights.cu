// gaussian_weights and its gradients as CUDA kernels over a model's tensors, on the same philox.h and gaussian_math.h
// as the CPU: the bits of its draws and of gradients to weights and to scales of their own.
//
// Floors per weight, for weights of s bytes with scales of as many ("additive", "weight"; where weights share scales,
// one tensor less in each):
//
//               bytes   instructions on sm_90, as the compiler counts them
//   draws       3 s     a normal 52, an exponential 22
//   gradients   5 s     the same and about 6 more (not counted)
//   a KL        0       normal 25 (multiplicative noise 49), log_uniform 51, approximate 91, ard 33; of additive
//                       noise the last three take a logarithm more, 26
//
// So arithmetic decides in half precision, and in fp32 it is as near to the limit as memory is. Hence a thread takes one
// quad of the noise at a time, 16 bytes of fp32 and 8 of bf16: wider accesses would save what does not count.
#include "gaussian_weights.h"

#include "../gaussian_math.h"
#include "../philox.h"
#include "float_type.cuh"
#include "multi_tensor.cuh"

namespace {

constexpr int kQuad = 4;

// Calls body(Type<T>{}) for the T of a type that is not fp64.
template <class Body> __device__ inline void with_narrow(FloatType type, const Body& body) {
  if (type == FloatType::f32) body(Type<float>{});
  else if (type == FloatType::bf16) body(Type<__nv_bfloat16>{});
  else body(Type<__half>{});
}
template <int N>
__device__ inline void load_as(FloatType type, const void* from, int64_t i, bool packs, int64_t left, float (&x)[N]) {
  with_narrow(type, [&](auto t) {
    load_some(static_cast<const typename decltype(t)::type*>(from) + i, packs, left, x);
  });
}
template <int N>
__device__ inline void store_as(FloatType type, const float (&x)[N], void* to, int64_t i, bool packs, int64_t left) {
  with_narrow(type, [&](auto t) { store_some(x, static_cast<typename decltype(t)::type*>(to) + i, packs, left); });
}

// What a thread reads of kQuad weights, of which `left` are there.
struct Quad {
  float mean[kQuad] = {}, scale[kQuad] = {};

  __device__ Quad(const GaussianTensors& t, int64_t i, bool packs, int64_t left) {
    if (t.weight) load_as(t.type, t.weight, i, packs, left, mean);
    if (t.run == 1) load_as(t.scale_type, t.scale, i, packs, left, scale);
    else load_shared(t, i, left);
  }

  __device__ void load_shared(const GaussianTensors& t, int64_t i, int64_t left) {
    int64_t element = i / t.run, place = i % t.run;
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      float value[1];
      load_as(t.scale_type, t.scale, element, true, 1, value);
      scale[e] = value[0];
      if (++place == t.run && e + 1 < left) ++element, place = 0;
    }
  }
};

__device__ inline void draw_quad(const GaussianTensors& t, const PhiloxKey& key, uint32_t sample, int64_t i,
                                 float (&eps)[kQuad]) {
  normal_quad(key, static_cast<uint32_t>(i / kQuad), static_cast<uint64_t>(t.row), sample, eps);
}

// The KL of a weight, and its slopes to scale and to the weight.
struct Divergence {
  float value, to_scale, to_weight;
};
template <KL kKind>
__device__ inline Divergence divergence(bool multiplicative, const Prior& prior, float weight, float scale) {
  if constexpr (kKind == KL::normal) {
    const float log_sigma2 = multiplicative ? gaussian_log_sigma2(weight, scale) : scale;
    const auto term = kl_normal<float, uint32_t>(weight, log_sigma2, prior.inverse_std, prior.log_variance);
    const float slope = saturate(term.slope, false);
    float to_weight = saturate(kl_normal_weight_slope(weight, prior.inverse_std), false);
    if (multiplicative) to_weight += slope_by_variance(weight, slope);
    return {term.value, slope, to_weight};
  } else {
    const float log_alpha = multiplicative ? scale : log_alpha_of(weight, scale);
    const auto term = kKind == KL::log_uniform               ? kl_log_uniform_exact<float, uint32_t>(log_alpha)
                      : kKind == KL::log_uniform_approximate ? kl_log_uniform_approximate<float, uint32_t>(log_alpha)
                                                             : kl_ard<float, uint32_t>(log_alpha);
    return {term.value, term.slope, multiplicative ? 0 : saturate(weight_slope(weight, term.slope), false)};
  }
}

// Calls step(i, left) for one thread's share of n elements that start at `first`: kQuad neighbours of element i, of
// which `left` are there.
template <class Step> __device__ inline void for_quads(int64_t first, int n, const Step& step) {
#pragma unroll 1
  for (int i = threadIdx.x * kQuad; i < n; i += kThreads * kQuad) step(first + i, n - i);
}

typedef Table<GaussianDraw, kGaussianChunk> DrawTable;
typedef Table<GaussianGradient, kGaussianChunk> GradientTable;

// ---- draws ----------------------------------------------------------------------------------------------------

// A block adds its share of the KL to a partial sum of its own: nothing depends on the order in which blocks run. And
// as the number of blocks follows from the tensors alone, every chip adds in the same order.
template <bool kHasKL, KL kKind>
__global__ void __launch_bounds__(kThreads)
    gaussian_draws(const __grid_constant__ DrawTable table, const __grid_constant__ GaussianOptions options,
                   double* partials) {
  static_assert(sizeof table + sizeof options + sizeof partials <= kArguments);
  const PhiloxKey key = PhiloxKey::of(*options.seed);
  double kl = 0;
  for_chunks(table, blockIdx.x, gridDim.x, [&](const GaussianDraw& t, int64_t first, int n) {
    const bool all = aligned(t.weight) && (t.run > 1 || aligned(t.scale)) && aligned(t.out);
    for_quads(first, n, [&](int64_t i, int left) {
      const bool packs = all && left >= kQuad;
      const Quad q(t, i, packs, left);
      if (t.out) {
        float eps[kQuad], drawn[kQuad];
        draw_quad(t, key, options.sample, i, eps);
#pragma unroll
        for (int e = 0; e < kQuad; ++e)
          drawn[e] = gaussian_draw<float, uint32_t>(t.multiplicative, q.mean[e], q.scale[e], eps[e]);
        store_as(t.type, drawn, t.out, i, packs, left);
      }
      if constexpr (kHasKL) {
        if (t.kl_times == 0) return;
        float sum = 0;
#pragma unroll
        for (int e = 0; e < kQuad; ++e)
          if (e < left) sum += divergence<kKind>(t.multiplicative, options.prior, q.mean[e], q.scale[e]).value;
        kl += sum * t.kl_times;
      }
    });
  });
  if constexpr (kHasKL) {
    __shared__ double shared[kThreads];
    const double total = block_sum(kl, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] += total;
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------

// What the weights of a chunk add to the gradient of each element of scale. Chunk c has its share of element k at
// sums[c + k]: of two elements in one chunk, or two chunks of one element, no two have the same place.
__device__ inline void sum_runs(const GaussianGradient& t, int64_t first, int n, const float (&values)[kGaussianChunk],
                                double (&shared)[kThreads]) {
  const int64_t chunk = first / kGaussianChunk, begin = first / t.run;
  const int elements = static_cast<int>((first + n - 1) / t.run - begin) + 1;
  int width = kThreads;  // threads of an element
  while (width > 1 && width * elements > kThreads) width /= 2;
#pragma unroll 1
  for (int pass = 0; pass < elements; pass += kThreads / width) {
    const int element = pass + static_cast<int>(threadIdx.x) / width;
    const bool there = element < elements;
    float sum = 0;
    if (there) {
      const int64_t from = (begin + element) * t.run - first, to = from + t.run;
      const int end = to < n ? static_cast<int>(to) : n;
      for (int i = (from > 0 ? static_cast<int>(from) : 0) + threadIdx.x % width; i < end; i += width) sum += values[i];
    }
    const double total = group_sum(sum, width, shared);
    if (there && threadIdx.x % width == 0) t.sums[chunk + begin + element] = total;
  }
}

template <bool kHasKL, KL kKind>
__global__ void __launch_bounds__(kThreads, 4)  // at most 64 registers
    gaussian_gradients_of(const __grid_constant__ GradientTable table, const __grid_constant__ GaussianOptions options,
                          const float* grad_kl_of) {
  static_assert(sizeof table + sizeof options + sizeof grad_kl_of <= kArguments);
  alignas(16) __shared__ float values[kGaussianChunk];
  __shared__ double shared[kThreads];
  const PhiloxKey key = PhiloxKey::of(*options.seed);
  const float grad_kl = kHasKL ? *grad_kl_of : 0;
  for_chunks(table, blockIdx.x, gridDim.x, [&](const GaussianGradient& t, int64_t first, int n) {
    const bool half = t.type == FloatType::f16, half_scale = t.scale_type == FloatType::f16;
    const bool all = aligned(t.weight) && (t.run > 1 || aligned(t.scale)) && aligned(t.grad) &&
                     aligned(t.grad_weight) && aligned(t.grad_scale);
    for_quads(first, n, [&](int64_t i, int left) {
      const bool packs = all && left >= kQuad;
      const Quad q(t, i, packs, left);
      float eps[kQuad], grad[kQuad], to_weight[kQuad], to_scale[kQuad];
      load_as(t.grad_type, t.grad, i, packs, left, grad);
      draw_quad(t, key, options.sample, i, eps);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        GaussianGradients<float> g =
            gaussian_gradients<float, uint32_t>(t.multiplicative, grad[e], q.mean[e], q.scale[e], eps[e]);
        if constexpr (kHasKL)
          if (t.kl_times != 0) {
            const Divergence kl = divergence<kKind>(t.multiplicative, options.prior, q.mean[e], q.scale[e]);
            g.scale += times_slope(grad_kl, kl.to_scale, half_scale);
            g.weight += times_slope(grad_kl, kl.to_weight, half);
          }
        to_weight[e] = g.weight, to_scale[e] = g.scale;
      }
      if (t.grad_weight) store_as(t.type, to_weight, t.grad_weight, i, packs, left);
      if (t.sums) {  // not store_pack, which writes to global memory
#pragma unroll
        for (int e = 0; e < kQuad; ++e) values[i - first + e] = to_scale[e];
      } else if (t.grad_scale) store_as(t.scale_type, to_scale, t.grad_scale, i, packs, left);
    });
    if (t.sums) {
      __syncthreads();
      sum_runs(t, first, n, values, shared);
    }
  });
}

// Elements of scale that several weights share: the sums of their chunks, each by `width` threads, and the KL where it
// is a function of these elements.
struct SumRow {
  int64_t numel;  // threads
  const double* sums;
  const void* scale;
  void* out;
  int64_t run;
  int width;
  FloatType type;
};
typedef Table<SumRow, kThreads> SumTable;

template <bool kHasKL, KL kKind>
__global__ void __launch_bounds__(kThreads)
    gaussian_scale_sums(const __grid_constant__ SumTable table, const float* grad_kl) {
  static_assert(sizeof table + sizeof grad_kl <= kArguments);
  __shared__ double shared[kThreads];
  for_chunks(table, blockIdx.x, gridDim.x, [&](const SumRow& t, int64_t first, int n) {
    const int64_t element = (first + threadIdx.x) / t.width;
    const int lane = threadIdx.x % t.width;
    const bool there = static_cast<int>(threadIdx.x) < n;
    double sum = 0;
    if (there) {
      const int64_t last = ((element + 1) * t.run - 1) / kGaussianChunk;
      for (int64_t c = element * t.run / kGaussianChunk + lane; c <= last; c += t.width) sum += t.sums[c + element];
    }
    sum = group_sum(sum, t.width, shared);
    if (!there || lane != 0) return;
    float value[1];
    if constexpr (kHasKL && kKind != KL::normal) {
      load_as(t.type, t.scale, element, true, 1, value);
      sum += double{*grad_kl} * t.run * divergence<kKind>(true, {}, 0, value[0]).to_scale;
    }
    value[0] = static_cast<float>(sum);
    store_as(t.type, value, t.out, element, true, 1);
  });
}

SumRow sum_row(const GaussianGradient& t) {
  if (!t.sums) return {};
  const int64_t chunks = t.run / kGaussianChunk + 1;
  int width = 1;  // such that a thread adds up eight chunks or so
  while (width < kThreads && 8 * width < chunks) width *= 2;
  return {t.numel / t.run * width, t.sums, t.scale, t.grad_scale, t.run, width, t.scale_type};
}

// ---- launches -------------------------------------------------------------------------------------------------

template <bool kHas, KL kValue> struct Kind {
  static constexpr bool has = kHas;
  static constexpr KL value = kValue;
};
template <class Body> void with_kl(const GaussianOptions& options, const Body& body) {
  if (!options.has_kl) return body(Kind<false, KL::normal>{});
  switch (options.kl) {
    case KL::log_uniform: return body(Kind<true, KL::log_uniform>{});
    case KL::log_uniform_approximate: return body(Kind<true, KL::log_uniform_approximate>{});
    case KL::ard: return body(Kind<true, KL::ard>{});
    case KL::normal: return body(Kind<true, KL::normal>{});
  }
}

}  // namespace

extern "C" void losssurf_gaussian_weights(const GaussianDraw* tensors, int64_t num_tensors,
                                          const GaussianOptions* options, double* partials, cudaStream_t stream) {
  with_kl(*options, [&](auto kind) {
    constexpr bool kHasKL = decltype(kind)::has;
    const auto row_of = [&](int64_t i) { return tensors[i]; };
    for_tables<DrawTable>(num_tensors, row_of, [&](const DrawTable& table) {
      const unsigned blocks = kHasKL ? blocks_for(table.chunks(), kGaussianPartials) : blocks_for(table.chunks());
      launch(gaussian_draws<kHasKL, decltype(kind)::value>, blocks, stream, table, *options, partials);
    });
  });
}

extern "C" void losssurf_gaussian_weights_backward(const GaussianGradient* tensors, int64_t num_tensors,
                                                   const GaussianOptions* options, const float* grad_kl,
                                                   cudaStream_t stream) {
  with_kl(*options, [&](auto kind) {
    constexpr bool kHasKL = decltype(kind)::has;
    constexpr KL kKind = decltype(kind)::value;
    const auto row_of = [&](int64_t i) { return tensors[i]; };
    for_tables<GradientTable>(num_tensors, row_of, [&](const GradientTable& table) {
      launch(gaussian_gradients_of<kHasKL, kKind>, blocks_for(table.chunks()), stream, table, *options, grad_kl);
    });
    const auto sum_row_of = [&](int64_t i) { return sum_row(tensors[i]); };
    for_tables<SumTable>(num_tensors, sum_row_of, [&](const SumTable& table) {
      launch(gaussian_scale_sums<kHasKL, kKind>, blocks_for(table.chunks()), stream, table, grad_kl);
    });
  });
}
