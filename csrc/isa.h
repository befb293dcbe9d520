// The instruction set that the hot kernels use, which is chosen once at run time.
// Sources listed in setup.py as ISA_SOURCES are compiled once per instruction set with RMSGD_ISA
// defined to the set's name. They keep everything they define inside `namespace rmsgd::RMSGD_ISA`
// and call no inline function of the standard library: the linker keeps one copy of such a
// function for the whole module, and it may be the one that holds AVX-512 instructions.
#pragma once

namespace rmsgd {

enum class Isa { baseline, avx2, avx512 };

// The widest set that this CPU and this build both have, or the one that the environment variable
// RMSGD_ISA names. Throws std::runtime_error when that one is unknown or cannot run here.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace rmsgd

// RMSGD_EACH_ISA(declarations;) declares the same functions in every instruction set's namespace;
// RMSGD_DISPATCH(function) is the one for the active set.
#if defined(__x86_64__)
#define RMSGD_EACH_ISA(...)   \
  namespace rmsgd::baseline { \
  __VA_ARGS__                 \
  }                           \
  namespace rmsgd::avx2 {     \
  __VA_ARGS__                 \
  }                           \
  namespace rmsgd::avx512 {   \
  __VA_ARGS__                 \
  }
#define RMSGD_DISPATCH(function)                                              \
  (::rmsgd::active_isa() == ::rmsgd::Isa::avx512 ? &::rmsgd::avx512::function \
   : ::rmsgd::active_isa() == ::rmsgd::Isa::avx2 ? &::rmsgd::avx2::function   \
                                                 : &::rmsgd::baseline::function)
#else
#define RMSGD_EACH_ISA(...)   \
  namespace rmsgd::baseline { \
  __VA_ARGS__                 \
  }
#define RMSGD_DISPATCH(function) (&::rmsgd::baseline::function)
#endif
