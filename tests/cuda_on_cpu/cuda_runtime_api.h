// CUDA's words as plain C++: a kernel's blocks run one after the other, the threads of a block as fibers that stand
// aside at __syncthreads. So csrc/cuda/*.cu run on a machine without CUDA, and their results are looked at.
#pragma once
#include <stdint.h>
#include <ucontext.h>

#include <functional>
#include <vector>

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

class Block {
 public:
  Block(unsigned threads, std::function<void()> body) : fibers_(threads) {
    body_ = body;
    for (Fiber& fiber : fibers_) {
      fiber.stack.resize(1 << 17);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, run, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        now_ = &fibers_[threadIdx.x];
        if (now_->done) continue;
        swapcontext(&scheduler_, &now_->context);
        any = any || !now_->done;
      }
    }
  }
  static void wait() { swapcontext(&now_->context, &scheduler_); }

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
  };
  static void run() {
    body_();
    now_->done = true;
  }
  std::vector<Fiber> fibers_;
  static inline std::function<void()> body_;
  static inline ucontext_t scheduler_;
  static inline Fiber* now_;
};
inline void __syncthreads() { Block::wait(); }

// What csrc/cuda/multi_tensor.cuh does with <<<>>>
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t, const Arguments&... arguments) {
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) Block(256, [&] { kernel(arguments...); });
}
