// One launch for a whole model's list of tensors.
//
// A table of the tensors travels in the kernel's arguments. So nothing is copied to the device first, nothing waits
// for it, and a CUDA graph keeps the table. A tensor is cut into chunks of kChunk elements, numbered through the whole
// table; block b takes the chunks b, b + blocks, ... and finds each one's tensor by bisection.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../scalar.h"

namespace {

constexpr int kThreads = 256;

// Bytes of a kernel's arguments, of which the functor may use some. More than 4 KB need CUDA 12.1 and, when it runs, a
// driver of at least 530: an older one refuses the launch.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr size_t kArguments = 4096;
#else
constexpr size_t kArguments = 32764;
#endif
constexpr size_t kFunctorArguments = 128;

// A Row describes one tensor to the kernel: pointers, and its number of elements as `numel`. What inherits from a table
// may use Extra bytes.
template <class Row, int Chunk, size_t Extra = 0> struct Table {
  static constexpr int kChunk = Chunk;
  static constexpr int kRows = (kArguments - kFunctorArguments - 8 - Extra) / (sizeof(Row) + sizeof(int64_t));
  int64_t rows = 0;
  int64_t ends[kRows];  // how many chunks the tensors up to and with this one have
  Row row[kRows];

  bool full() const { return rows == kRows; }
  void add(const Row& r) {
    ends[rows] = chunks() + (r.numel + kChunk - 1) / kChunk;
    row[rows++] = r;
  }
  LSF_INLINE int64_t chunks() const { return rows ? ends[rows - 1] : 0; }

  // The tensor of a chunk; it does not come before tensor `low`.
  LSF_INLINE int find(int64_t chunk, int low) const {
    for (int high = static_cast<int>(rows) - 1; low < high;) {
      const int middle = (low + high) / 2;
      if (chunk < ends[middle]) high = middle;
      else low = middle + 1;
    }
    return low;
  }
};

// Calls launch(table) for as few tables as hold all tensors that have elements: row_of(i) describes tensor i.
template <class Table, class RowOf, class Launch>
void for_tables(int64_t tensors, const RowOf& row_of, const Launch& launch) {
  Table table;
  for (int64_t i = 0; i < tensors; ++i) {
    const auto row = row_of(i);
    if (row.numel == 0) continue;
    if (table.full()) {
      launch(table);
      table.rows = 0;
    }
    table.add(row);
  }
  if (table.rows > 0) launch(table);
}

// Calls body(row, first, n) for the chunks of one block: n elements of a tensor, starting at `first`.
template <class Table, class Body>
LSF_INLINE void for_chunks(const Table& table, int64_t block, int64_t blocks, const Body& body) {
  const int64_t chunks = table.chunks();
  int row = 0;
  for (int64_t chunk = block; chunk < chunks; chunk += blocks) {
    row = table.find(chunk, row);
    const int64_t first = (chunk - (row > 0 ? table.ends[row - 1] : 0)) * Table::kChunk;
    const int64_t left = table.row[row].numel - first;
    body(table.row[row], first, left < Table::kChunk ? static_cast<int>(left) : Table::kChunk);
  }
}

template <int N> struct Width {
  static constexpr int value = N;
};

// Calls step(i, Width<...>) for one thread's share of a chunk of n elements: N neighbours at a time where the tensor's
// memory is `aligned`, then one by one.
template <int N, class Step> LSF_INLINE void for_packs(bool aligned, int n, int thread, const Step& step) {
  const int packed = aligned ? n / N * N : 0;
#pragma unroll 1  // many threads keep the memory busy, not many registers
  for (int i = thread * N; i < packed; i += kThreads * N) step(i, Width<N>{});
#pragma unroll 1
  for (int i = packed + thread; i < n; i += kThreads) step(i, Width<1>{});
}

// Whether memory can be accessed 16 bytes at a time; null counts as such.
LSF_INLINE bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline unsigned blocks_for(int64_t chunks, int64_t most = 65536) {
  return static_cast<unsigned>(chunks < most ? chunks : most);
}

// The sum over each group of `width` threads, a power of two, for the first thread of the group.
__device__ inline double group_sum(double value, unsigned width, double (&shared)[kThreads]) {
  const unsigned lane = threadIdx.x % width;
  __syncthreads();  // the sum before this one has been read
  shared[threadIdx.x] = value;
  for (unsigned half = width / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return shared[threadIdx.x];
}
__device__ inline double block_sum(double value, double (&shared)[kThreads]) {
  return group_sum(value, kThreads, shared);
}

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
}
#endif

// functor(row, first, n, thread) for every chunk
template <class Table, class Functor>
__global__ void __launch_bounds__(kThreads)
    multi_tensor(const __grid_constant__ Table table, const __grid_constant__ Functor functor) {
  static_assert(sizeof table + sizeof functor <= kArguments);
  for_chunks(table, blockIdx.x, gridDim.x, [&](const auto& row, int64_t first, int n) {
    functor(row, first, n, threadIdx.x);
  });
}

}  // namespace
