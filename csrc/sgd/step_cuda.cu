// Entry points of the fused momentum step.
#include "../team_cuda.h"
#include "step_cuda.h"

namespace rmsgd {
namespace {

// Every warp takes one item.
template <int words>
__device__ __forceinline__ void step_block(const StepArguments<words>& arguments) {
  const int warps = int(blockDim.x) / WARP;
  const int number = int(blockIdx.x) * warps + int(threadIdx.x) / WARP;
  if (number >= arguments.items) return;
  WarpTeam team;
  step_item(team, arguments, arguments.first_item + number);
}

}  // namespace
}  // namespace rmsgd

// Four blocks of 256 threads on a multiprocessor have enough loads in flight to fill the memory bus.
extern "C" __global__ void __launch_bounds__(256, 4)
    rmsgd_step(const __grid_constant__ rmsgd::StepArguments<rmsgd::STEP_SMALL> arguments) {
  rmsgd::step_block(arguments);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    rmsgd_step_large(const __grid_constant__ rmsgd::StepArguments<rmsgd::STEP_LARGE> arguments) {
  rmsgd::step_block(arguments);
}
