// csrc/cuda/curve.cu with its glue, as operators on CPU tensors: test_curve_cuda.py calls them. cuda_on_cpu/ stands in
// for CUDA and for torch's side of it.
#include <ATen/ATen.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, device, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "cuda/curve.cu"
#include "cuda/curve_glue.cpp"

TORCH_LIBRARY(losssurf_cuda_on_cpu, m) {
  m.def("curve_weights(Tensor[] bends, Tensor coefficients) -> Tensor[]", &losssurf::curve_weights_cuda);
  m.def("curve_weights_backward(Tensor[] grads, Tensor[] bends, Tensor coefficients, bool[] needed, "
        "bool need_coefficients) -> Tensor[]", &losssurf::curve_weights_backward_cuda);
}
