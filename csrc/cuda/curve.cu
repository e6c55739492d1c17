// curve_weights and its gradients as CUDA kernels over a model's tensors, on the same curve_math.h as the CPU.
//
// Floors for K bends, R of them with coefficients that are not 0, and elements of s bytes:
//
//                                     bytes per element    operations per element
//   weights                           (R + 1) s            R multiplications or fma
//   gradients of B bends              (1 + B) s            B multiplications
//   and those of the coefficients     (1 + B + K) s        B multiplications, K fma
//
// In fp32 with K = R = 3 and the inner bend trained: 16, 8 and 20 bytes for at most 4 operations. Memory decides; the
// rest of a thread's work (a bend's address, its coefficient, a branch) is per 16 bytes.
#include "curve.h"

#include "../curve_math.h"
#include "float_type.cuh"
#include "multi_tensor.cuh"

namespace {

constexpr int kAhead = 4;  // bends that are loaded together, or whose sums are in registers together

struct CurveRow {
  int64_t numel;
  void* weight;
};

// A table whose rows have any number of others, which lie one after the other: as many as rows of kAhead have.
constexpr size_t kRowBytes = sizeof(CurveRow) + sizeof(int64_t) + kAhead * sizeof(void*);
constexpr int kOthers = (kArguments - kFunctorArguments - 16) / kRowBytes * kAhead;
struct CurveTable : Table<CurveRow, 8192, sizeof(int64_t) + kOthers * sizeof(void*)> {
  int64_t width = 0;  // others of a row
  void* other[kOthers];

  struct Entry : CurveRow {
    void* const* others;
    int64_t width;
  };
  bool full() const { return rows == kRows || (rows + 1) * width > kOthers; }
  void add(const Entry& entry) {
    width = entry.width;
    for (int64_t k = 0; k < width; ++k) other[rows * width + k] = entry.others[k];
    Table::add(entry);
  }
  LSF_INLINE int64_t place(const CurveRow& r) const { return (&r - row) * width; }
  LSF_INLINE bool packs(const CurveRow& r) const {
    bool all = aligned(r.weight);
    for (int64_t k = place(r), end = k + width; k < end; ++k) all = all && aligned(other[k]);
    return all;
  }
};

// Calls run(table) for tables with the others [begin, begin + width) of every tensor.
template <class Run>
void for_others(const CurveTensors* tensors, int64_t num_tensors, int begin, int width, const Run& run) {
  const auto row_of = [&](int64_t i) {
    return CurveTable::Entry{{tensors[i].numel, tensors[i].weight}, tensors[i].others + begin, width};
  };
  for_tables<CurveTable>(num_tensors, row_of, run);
}

// ---- weights --------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    curve_weights(const __grid_constant__ CurveTable table, const __grid_constant__ CurveCoefficients coefficients) {
  static_assert(sizeof table + sizeof coefficients <= kArguments);
  using F = typename Wide<T>::type;
  const F* values = static_cast<const F*>(coefficients.values);
  for_chunks(table, blockIdx.x, gridDim.x, [&](const CurveRow& row, int64_t first, int n) {
    const int64_t place = table.place(row);
    for_packs<16 / sizeof(T)>(table.packs(row), n, threadIdx.x, [&](int i, auto width) {
      constexpr int N = width.value;
      F total[N] = {};
      bool any = false;
#pragma unroll 1
      for (int begin = 0; begin < coefficients.count; begin += kAhead) {
        F c[kAhead], bend[kAhead][N];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) c[k] = begin + k < coefficients.count ? values[begin + k] : 0;
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (c[k] != 0) load_pack(static_cast<const T*>(table.other[place + begin + k]) + first + i, bend[k]);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (c[k] == 0) continue;
#pragma unroll
          for (int e = 0; e < N; ++e)
            total[e] = any ? curve_next(total[e], bend[k][e], c[k]) : curve_first(bend[k][e], c[k]);
          any = true;
        }
      }
      store_pack(total, static_cast<T*>(row.weight) + first + i);
    });
  });
}

// ---- gradients ------------------------------------------------------------------------------------------------

// The others of a row are `grads` gradients, those of all bends or none, and then `sums` bends.
struct Gradients {
  CurveCoefficients coefficients;
  int grads, sums;
  double* partials;  // of the first of these bends
};

// A block adds what it sees to partials of its own: nothing depends on the order in which blocks run. And as the number
// of blocks follows from the tensors alone, every chip adds in the same order.
template <class T, bool Sums>
__global__ void __launch_bounds__(kThreads)
    curve_gradients(const __grid_constant__ CurveTable table, const __grid_constant__ Gradients s) {
  static_assert(sizeof table + sizeof s <= kArguments);
  using F = typename Wide<T>::type;
  const F* coefficients = static_cast<const F*>(s.coefficients.values);
  double sum[kAhead] = {};
  for_chunks(table, blockIdx.x, gridDim.x, [&](const CurveRow& row, int64_t first, int n) {
    const int64_t place = table.place(row);
    for_packs<16 / sizeof(T)>(table.packs(row), n, threadIdx.x, [&](int i, auto width) {
      constexpr int N = width.value;
      F grad[N];
      load_pack(static_cast<const T*>(row.weight) + first + i, grad);
      if constexpr (Sums) {
        F bend[kAhead][N];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (k < s.sums) load_pack(static_cast<const T*>(table.other[place + s.grads + k]) + first + i, bend[k]);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (k >= s.sums) continue;
          F dot = 0;  // in fp32 over these neighbours, in fp64 over all others
#pragma unroll
          for (int e = 0; e < N; ++e) dot = curve_dot(dot, grad[e], bend[k][e]);
          sum[k] += dot;
        }
      }
#pragma unroll 1
      for (int j = 0; j < s.grads; ++j) {
        T* to = static_cast<T*>(table.other[place + j]);
        if (!to) continue;
        const F c = coefficients[j];
        F product[N];
#pragma unroll
        for (int e = 0; e < N; ++e) product[e] = curve_first(grad[e], c);
        store_pack(product, to + first + i);
      }
    });
  });
  if constexpr (Sums) {
    __shared__ double shared[kThreads];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k >= s.sums) continue;
      const double total = block_sum(sum[k], shared);
      if (threadIdx.x == 0) s.partials[k * kCurvePartials + blockIdx.x] += total;
    }
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads) curve_sum(const double* partials, Out* out, int count) {
  __shared__ double shared[kThreads];
  for (int j = blockIdx.x; j < count; j += gridDim.x) {
    double sum = 0;
    for (int i = threadIdx.x; i < kCurvePartials; i += kThreads) sum += partials[j * kCurvePartials + i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) out[j] = static_cast<Out>(sum);
  }
}

}  // namespace

extern "C" int losssurf_curve_max_bends() { return kOthers - kAhead; }

extern "C" void losssurf_curve_weights(FloatType type, const CurveTensors* tensors, int64_t num_tensors,
                                       CurveCoefficients coefficients, cudaStream_t stream) {
  with_type(type, [&](auto t) {
    using T = typename decltype(t)::type;
    for_others(tensors, num_tensors, 0, coefficients.count, [&](const CurveTable& table) {
      launch(curve_weights<T>, blocks_for(table.chunks()), stream, table, coefficients);
    });
  });
}

extern "C" void losssurf_curve_weights_backward(FloatType type, const CurveTensors* tensors, int64_t num_tensors,
                                                CurveCoefficients coefficients, double* partials, cudaStream_t stream) {
  const int count = coefficients.count;
  with_type(type, [&](auto t) {
    using T = typename decltype(t)::type;
    if (!partials) {
      const Gradients s = {coefficients, count, 0, nullptr};
      return for_others(tensors, num_tensors, 0, count, [&](const CurveTable& table) {
        launch(curve_gradients<T, false>, blocks_for(table.chunks()), stream, table, s);
      });
    }
    for (int done = 0; done < count; done += kAhead) {  // the first pass writes the gradients of all bends
      const int grads = done == 0 ? count : 0, sums = count - done < kAhead ? count - done : kAhead;
      const Gradients s = {coefficients, grads, sums, partials + int64_t{done} * kCurvePartials};
      for_others(tensors, num_tensors, count + done - grads, grads + sums, [&](const CurveTable& table) {
        launch(curve_gradients<T, true>, blocks_for(table.chunks(), kCurvePartials), stream, table, s);
      });
    }
  });
}

extern "C" void losssurf_curve_sum(const double* partials, void* grad_coefficients, FloatType type, int count,
                                   cudaStream_t stream) {
  const unsigned blocks = blocks_for(count);
  if (type == FloatType::f64) launch(curve_sum<double>, blocks, stream, partials, (double*)grad_coefficients, count);
  else launch(curve_sum<float>, blocks, stream, partials, (float*)grad_coefficients, count);
}
