// Which instruction set's kernels run.
#include "kernels.h"

#include <string.h>

#include <atomic>

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

namespace {

bool supported(const Kernels& table) {
  if (&table == &kernels_baseline) return true;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&table == &kernels_avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Kernels* const all[] = {&kernels_avx512, &kernels_avx2, &kernels_baseline};  // best first

const Kernels* best() {
  for (const Kernels* table : all)
    if (supported(*table)) return table;
  return &kernels_baseline;
}

std::atomic<const Kernels*> active{best()};

}  // namespace

const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

bool use_instruction_set(const char* name) {
  for (const Kernels* table : all)
    if (!strcmp(table->instruction_set, name) && supported(*table)) {
      active.store(table, std::memory_order_relaxed);
      return true;
    }
  return false;
}
