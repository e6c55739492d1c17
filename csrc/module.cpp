// losssurf_fast._C: loads the kernels (each registers itself with the dispatcher) and answers questions
// about the build. Operators never come through here.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", [] { return std::string(kernels().instruction_set); },
        "Instruction set whose CPU kernels run: 'avx512', 'avx2' or 'baseline'.");
  m.def("use_instruction_set", &use_instruction_set,
        "Choose an instruction set's kernels; False where this CPU lacks it. For tests and benchmarks.");
  m.def("compiler", [] { return std::string("g++ " __VERSION__); });
}
