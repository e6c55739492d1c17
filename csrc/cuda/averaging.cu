// lerp_ and ema_ as one CUDA kernel over a model's tensors, on the same averaging_math.h as the CPU.
#include "averaging.h"

#include "../averaging_math.h"
#include "float_type.cuh"
#include "multi_tensor.cuh"

namespace {

template <int Count> struct LerpRow {
  int64_t numel;
  const void* value;
  void* averages[Count];
};

// Count averages of type A of a value of type V, which is read once.
template <class A, class V, int Count> struct Lerp {
  using F = typename Wide<A, V>::type;
  static constexpr int kPack = 16 / (sizeof(A) > sizeof(V) ? sizeof(A) : sizeof(V));
  LerpWeightIn<F> weights[Count];

  __device__ void operator()(const LerpRow<Count>& row, int64_t first, int n, int thread) const {
    const V* values = static_cast<const V*>(row.value) + first;
    bool packs = aligned(row.value);
#pragma unroll
    for (int k = 0; k < Count; ++k) packs = packs && aligned(row.averages[k]);
    for_packs<kPack>(packs, n, thread, [&](int i, auto width) {
      F value[width.value];
      load_pack(values + i, value);
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        if (!row.averages[k]) continue;
        A* at = static_cast<A*>(row.averages[k]) + first + i;
        F average[width.value];
        load_pack(at, average);
#pragma unroll
        for (int e = 0; e < width.value; ++e) average[e] = lerp_element(average[e], value[e], weights[k]);
        store_pack(average, at);
      }
    });
  }
};

template <class A, class V, int Count>
void lerp(const LerpTensors* tensors, int64_t num_tensors, const double* weights, int count, cudaStream_t stream) {
  Lerp<A, V, Count> functor;
  typedef LerpWeightIn<typename Wide<A, V>::type> Weight;
  for (int k = 0; k < Count; ++k) functor.weights[k] = Weight::of(k < count ? weights[k] : 0);
  const auto row_of = [&](int64_t i) {
    LerpRow<Count> row = {tensors[i].numel, tensors[i].value, {}};
    for (int k = 0; k < count; ++k) row.averages[k] = tensors[i].averages[k];
    return row;
  };
  typedef Table<LerpRow<Count>, 8192> Rows;
  for_tables<Rows>(num_tensors, row_of, [&](const Rows& table) {
    launch(multi_tensor<Rows, Lerp<A, V, Count>>, blocks_for(table.chunks()), stream, table, functor);
  });
}

}  // namespace

extern "C" void losssurf_lerp(FloatType average, FloatType value, const LerpTensors* tensors, int64_t num_tensors,
                              const double* weights, int count, cudaStream_t stream) {
  with_type(average, [&](auto a) {
    with_type(value, [&](auto v) {
      using A = typename decltype(a)::type;
      using V = typename decltype(v)::type;
      if (count == 1) lerp<A, V, 1>(tensors, num_tensors, weights, count, stream);
      else lerp<A, V, kMaxAverages>(tensors, num_tensors, weights, count, stream);
    });
  });
}
