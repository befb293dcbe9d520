// The CUDA kernels as they are, with the CPU in the place of the GPU.
#include "cuda.h"
// The kernels, after what stands for CUDA.
#include "evbmf/rates_cuda.cu"
#include "kernels_cuda.h"
#include "sgd/step_cuda.cu"
#include "spectrum/spectrum_cuda.cu"
// After them too: what runs a launch.
#include "launch.h"

namespace rmsgd {
alignas(16) unsigned char dynamic_shared[256 * 1024];
}

namespace emulator {
namespace {

constexpr unsigned char kUntouched = 0xa5;
constexpr int kFence = 4096;

}  // namespace

void run(const std::function<void()>& kernel, int first, int blocks, int threads, int shared_bytes,
         Order order) {
  Grid here;
  here.threads = threads;
  here.blocks.resize(blocks);
  here.warps.resize(std::size_t(blocks) * threads / 32);
  for (Meeting& block : here.blocks) block.live = threads;
  for (Warp& warp : here.warps) warp.meeting.live = 32;
  unsigned char* const beyond = rmsgd::dynamic_shared + shared_bytes;
  std::memset(beyond, kUntouched, kFence);
  // Every block has shared memory of its own, full of NaN in the beginning.
  std::vector<std::vector<unsigned char>> shared(blocks, std::vector<unsigned char>(shared_bytes, 0xff));
  int loaded = -1;
  blockDim = {unsigned(threads), 1, 1};
  Fibers fibers(
      blocks * threads, order,
      [&](int k) {
        kernel();
        for (Meeting* meeting : {&here.blocks[k / threads], &here.warps[k / 32].meeting}) {
          --meeting->live;
          meeting->release_if_complete();
        }
      },
      [&](int k) {
        const int block = k / threads;
        threadIdx = {unsigned(k % threads), 0, 0};
        blockIdx = {unsigned(first + block), 0, 0};
        if (block == loaded) return;
        if (loaded >= 0) std::memcpy(shared[loaded].data(), rmsgd::dynamic_shared, shared_bytes);
        std::memcpy(rmsgd::dynamic_shared, shared[block].data(), shared_bytes);
        loaded = block;
      });
  here.fibers = &fibers;
  grid = &here;
  fibers.run();
  grid = nullptr;
  for (int i = 0; i < kFence; ++i) {
    if (beyond[i] == kUntouched) continue;
    std::fprintf(stderr, "a kernel wrote beyond its %d bytes of shared memory\n", shared_bytes);
    std::abort();
  }
}

}  // namespace emulator
