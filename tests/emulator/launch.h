// Runs a kernel's blocks.
#pragma once

#include <functional>

#include "fibers.h"

namespace emulator {

// Blocks [first, first + blocks) at once; aborts where the kernel writes beyond its shared memory or where
// all its threads wait for each other.
void run(const std::function<void()>& kernel, int first, int blocks, int threads, int shared_bytes,
         Order order);

}  // namespace emulator
