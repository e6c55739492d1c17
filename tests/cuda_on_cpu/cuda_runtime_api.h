// CUDA's words as plain C++: a kernel's blocks run one after the other, the threads of a block as fibers that stand
// aside at __syncthreads. So csrc/cuda/*.cu run on a machine without CUDA, and their results are looked at.
#pragma once
#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)
#define __grid_constant__

typedef struct CUstream_st* cudaStream_t;
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
template <class T> void __stcs(T* to, T value) { *to = value; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};
constexpr int kFibers = 256;
inline Fiber fibers[kFibers];
inline ucontext_t scheduler;
inline std::function<void()> fiber_body;

inline void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

inline void run_block(std::function<void()> body) {
  constexpr size_t kStack = 1 << 17;
  fiber_body = body;
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, [] { fiber_body(), fibers[threadIdx.x].done = true; }, 0);
  }
  bool any = true;
  for (int round = 0; any; ++round) {
    any = false;
    for (int i = 0; i < kFibers; ++i) {
      threadIdx.x = (round + blockIdx.x) % 2 ? i : kFibers - 1 - i;  // forwards, then backwards: races show
      Fiber& fiber = fibers[threadIdx.x];
      if (!fiber.done) any = true, swapcontext(&scheduler, &fiber.context);
    }
  }
}

// What csrc/cuda/multi_tensor.cuh does with <<<>>>, in a small grid: its kernels stride over any.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t, const Arguments&... arguments) {
  gridDim.x = std::min(blocks, 3u);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block([&] { kernel(arguments...); });
}
