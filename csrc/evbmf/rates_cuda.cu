// Entry point of the learning-rate rules. One block: the release's rule walks its layers in order.
#include "../team_cuda.h"
#include "rates_cuda.h"

extern "C" __global__ void __launch_bounds__(256)
    rmsgd_rates(const __grid_constant__ rmsgd::RatesArguments arguments) {
  rmsgd::BlockTeam team;
  rmsgd::update_rates(team, arguments.tables, arguments.metrics, arguments.measured, arguments.held);
}
