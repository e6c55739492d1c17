// csrc/cuda/averaging.cu and swag.cu as a C++ library: test_averaging_cuda.py calls it. cuda_on_cpu/ stands in for CUDA.
#include "cuda/averaging.cu"
#include "cuda/swag.cu"

struct Numbered {
  int64_t numel, number;
};

// Every chunk that some block visits, as (launch, tensor, first element, elements); returns how many. `rows` becomes
// the number of tensors of a launch.
extern "C" int64_t visits(const int64_t* numels, int64_t tensors, int64_t blocks, int64_t (*out)[4], int64_t* rows) {
  typedef Table<Numbered, 8192> Rows;
  *rows = Rows::kRows;
  int64_t launches = 0, n = 0;
  for_tables<Rows>(tensors, [&](int64_t i) { return Numbered{numels[i], i}; }, [&](const Rows& table) {
    for (int64_t block = 0; block < blocks; ++block)
      for_chunks(table, block, blocks, [&](Numbered row, int64_t first, int elements) {
        const int64_t visit[4] = {launches, row.number, first, elements};
        if (out) memcpy(out[n], visit, sizeof visit);
        ++n;
      });
    ++launches;
  });
  return n;
}

// How often each of n elements of a chunk is visited.
extern "C" void packs(int n, bool aligned, int* counts) {
  for (int thread = 0; thread < kThreads; ++thread)
    for_packs<4>(aligned, n, thread, [&](int i, auto width) {
      for (int e = 0; e < width.value; ++e) ++counts[i + e];
    });
}
