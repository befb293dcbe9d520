#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rmsgd {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports knows this feature only in newer compilers.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool can_run(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::avx512:
      return can_run(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa choose() {
  const char* forced = std::getenv("RMSGD_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (forced != nullptr && *forced != '\0') {
      if (std::string(forced) != isa_name(isa)) continue;
      if (!can_run(isa)) {
        throw std::runtime_error(std::string("RMSGD_ISA=") + forced +
                                 ": this CPU does not have that instruction set");
      }
      return isa;
    }
    if (can_run(isa)) return isa;
  }
  throw std::runtime_error(std::string("RMSGD_ISA=") + forced +
                           " is unknown; choose baseline, avx2 or avx512");
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace rmsgd
