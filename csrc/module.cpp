// losssurf_fast._C: loads the kernels (each registers itself with the dispatcher) and answers questions
// about the build. Operators never come through here.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/curve_linear.h"
#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", [] { return std::string(kernels().instruction_set); },
        "Instruction set whose CPU kernels run: 'avx512', 'avx2' or 'baseline'.");
  m.def("use_instruction_set", &use_instruction_set,
        "Choose an instruction set's kernels; False where this CPU lacks it. For tests and benchmarks.");
  m.def("curve_linear_on_the_fly", &losssurf::curve_linear_on_the_fly,
        "Whether curve_linear multiplies this many rows, in elements of this many bytes, without writing a weight.");
  m.def("compiler", [] { return std::string("g++ " __VERSION__); });
}
