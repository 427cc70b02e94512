// Choice of the instruction set, made once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace gmp::cpu {
namespace {

const KernelSet& pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi2");
  const std::pair<const KernelSet*, bool> candidates[] = {
      {&kAvx512Vbmi2Kernels, vbmi2}, {&kAvx512Kernels, avx512}, {&kAvx2Kernels, avx2}, {&kPortableKernels, true}};
#elif defined(__aarch64__)
  const std::pair<const KernelSet*, bool> candidates[] = {{&kNeonKernels, true}, {&kPortableKernels, true}};
#else
  const std::pair<const KernelSet*, bool> candidates[] = {{&kPortableKernels, true}};
#endif
  const char* wanted = std::getenv("GMP_KERNELS_ISA");
  for (const auto& [set, runs_here] : candidates) {
    if (wanted == nullptr || *wanted == '\0') {
      if (runs_here) return *set;
    } else if (std::string(wanted) == set->front().name) {
      if (runs_here) return *set;
      throw std::invalid_argument("GMP_KERNELS_ISA=" + std::string(wanted) + ": this CPU cannot run it; unset it");
    }
  }
  std::string names;
  for (const auto& [set, runs_here] : candidates) names += (names.empty() ? "" : ", ") + std::string(set->front().name);
  throw std::invalid_argument("GMP_KERNELS_ISA: expected one of " + names + ", got '" + std::string(wanted) + "'");
}

}  // namespace

const KernelSet& active_kernels() {
  static const KernelSet& set = pick();
  return set;
}

}  // namespace gmp::cpu
