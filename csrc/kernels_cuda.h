// Every CUDA kernel of the package: its name and its one argument, a struct passed by value.
#pragma once

#include "evbmf/rates_cuda.h"
#include "sgd/step_cuda.h"
#include "spectrum/spectrum_cuda.h"

// clang-format off
#define RMSGD_KERNELS(kernel)                                       \
  kernel(rmsgd_step, rmsgd::StepArguments<rmsgd::STEP_SMALL>)       \
  kernel(rmsgd_step_large, rmsgd::StepArguments<rmsgd::STEP_LARGE>) \
  kernel(rmsgd_gram, rmsgd::SpectrumArguments)                      \
  kernel(rmsgd_gram_sum, rmsgd::SpectrumArguments)                  \
  kernel(rmsgd_gram_double, rmsgd::SpectrumArguments)               \
  kernel(rmsgd_tridiagonal, rmsgd::SpectrumArguments)               \
  kernel(rmsgd_tridiagonal_double, rmsgd::SpectrumArguments)        \
  kernel(rmsgd_sturm, rmsgd::SpectrumArguments)                     \
  kernel(rmsgd_sturm_double, rmsgd::SpectrumArguments)              \
  kernel(rmsgd_measure, rmsgd::SpectrumArguments)                   \
  kernel(rmsgd_measure_double, rmsgd::SpectrumArguments)            \
  kernel(rmsgd_svd, rmsgd::SpectrumArguments)                       \
  kernel(rmsgd_values, rmsgd::ValuesArguments)                      \
  kernel(rmsgd_rates, rmsgd::RatesArguments)
// clang-format on
