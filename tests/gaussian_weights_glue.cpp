// csrc/cuda/gaussian_weights.cu with its glue, as operators on CPU tensors: test_gaussian_weights_cuda.py calls them.
// cuda_on_cpu/ stands in for CUDA and for torch's side of it.
#include <ATen/ATen.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, device, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "cuda/gaussian_weights.cu"
#include "cuda/gaussian_weights_glue.cpp"

// How many tensors of draws and of gradients a launch takes.
extern "C" void tables(int64_t* draws, int64_t* gradients) {
  *draws = DrawTable::kRows;
  *gradients = GradientTable::kRows;
}

TORCH_LIBRARY(losssurf_gaussian_on_cpu, m) {
  m.def("gaussian_weights(Tensor[] weights, Tensor[] scales, str[] parameterizations, Tensor seed, int row_offset, "
        "int sample, str prior, float prior_std) -> (Tensor[], Tensor)", &losssurf::gaussian_weights_cuda);
  m.def("gaussian_weights_backward(Tensor[] grads, Tensor grad_kl, Tensor[] weights, Tensor[] scales, "
        "str[] parameterizations, bool[] needed, Tensor seed, int row_offset, int sample, str prior, float prior_std) "
        "-> Tensor[]", &losssurf::gaussian_weights_backward_cuda);
}
