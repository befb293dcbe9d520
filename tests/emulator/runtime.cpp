// CUDA's runtime, as far as csrc/bind_cuda.cpp calls it, over the emulator: two GPUs of one multiprocessor
// that do at once what they are told.
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "cuda_runtime.h"
#include "kernels_cuda.h"
#include "launch.h"

#define RMSGD_DECLARE(name, Arguments) extern "C" void name(Arguments);
RMSGD_KERNELS(RMSGD_DECLARE)
#undef RMSGD_DECLARE

// What a test chooses: the order of threads, how many blocks a GPU holds, the shared memory of a block that asks
// for it (and of a multiprocessor), how much of that a GPU really lends, and whether its queue is full, so that
// launches wait.
extern "C" {
int emulated_order = emulator::FORWARD;
int emulated_resident = 6;
int emulated_shared = 64 * 1024;  // sm_75
int emulated_lent = 64 * 1024;
std::atomic<int> emulated_queue_full = 0;
}

namespace {

constexpr int kDevices = 2;
constexpr int kSharedUnasked = 48 * 1024;

struct Kernel {
  std::function<void(const void*)> call;
  int shared_bytes = kSharedUnasked;  // that a launch may ask for
};

Kernel* find(const void* function) {
#define RMSGD_KERNEL(known, Arguments)    \
  {reinterpret_cast<const void*>(&known), \
   {[](const void* arguments) { known(*static_cast<const Arguments*>(arguments)); }}},
  static std::map<const void*, Kernel> kernels = {RMSGD_KERNELS(RMSGD_KERNEL)};
#undef RMSGD_KERNEL
  const auto found = kernels.find(function);
  return found == kernels.end() ? nullptr : &found->second;
}

// A device's context, which the first use of the device creates. The current one is the thread's own.
struct Context {
  bool created = false;
};
Context contexts[kDevices];
thread_local Context* current_context = nullptr;

int get_context(void** context) {
  *context = current_context;
  return 0;
}

int set_context(void* context) {
  current_context = static_cast<Context*>(context);
  return 0;
}

bool queue_is_full() {
  for (int i = 0; emulated_queue_full && i < 1000; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return emulated_queue_full;
}

// A cooperative launch runs all its blocks at once, another one block after the other.
cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes,
                   bool cooperative) {
  Kernel* const kernel = find(function);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (block.x % 32 != 0) return cudaErrorInvalidConfiguration;  // teams are whole warps
  if (shared_bytes > std::size_t(kernel->shared_bytes)) return cudaErrorInvalidValue;
  if (current_context == nullptr) return cudaErrorInvalidDevice;
  if (queue_is_full()) return cudaErrorLaunchTimeout;
  static std::mutex guard;
  const std::lock_guard<std::mutex> one_at_a_time(guard);
  const auto call = [&] { kernel->call(arguments[0]); };
  const emulator::Order order = emulator::Order(emulated_order);
  const int blocks = int(grid.x), threads = int(block.x), shared = int(shared_bytes);
  if (cooperative) {
    emulator::run(call, 0, blocks, threads, shared, order);
    return cudaSuccess;
  }
  for (int k = 0; k < blocks; ++k) {
    emulator::run(call, order == emulator::REVERSE ? blocks - 1 - k : k, 1, threads, shared, order);
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return error == cudaSuccess ? "no error" : "invalid argument";
  }
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_context = &contexts[device];
  current_context->created = true;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const std::string name = symbol;
  *function = name == "cuCtxGetCurrent"   ? reinterpret_cast<void*>(&get_context)
              : name == "cuCtxSetCurrent" ? reinterpret_cast<void*>(&set_context)
                                          : nullptr;
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// For a test: whether a device has a context, and which device's is the thread's; -1: none.
int emulated_has_context(int device) { return contexts[device].created; }
void emulated_forget_contexts() {
  for (Context& context : contexts) context.created = false;
  current_context = nullptr;
}
int emulated_current_device() { return current_context ? int(current_context - contexts) : -1; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  static const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrMultiProcessorCount, 1},
      {cudaDevAttrClockRate, 1'500'000},
  };
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ||
      attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = emulated_shared;
    return cudaSuccess;
  }
  const auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  Kernel* const kernel = find(function);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (value > emulated_lent) return cudaErrorInvalidValue;
  kernel->shared_bytes = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int,
                                                          std::size_t shared_bytes) {
  if (find(function) == nullptr) return cudaErrorInvalidDeviceFunction;
  *blocks = shared_bytes > std::size_t(emulated_shared) ? 0 : emulated_resident;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             std::size_t shared_bytes, cudaStream_t) {
  return launch(function, grid, block, arguments, shared_bytes, false);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                        std::size_t shared_bytes, cudaStream_t) {
  if (grid.x > unsigned(emulated_resident)) return cudaErrorCooperativeLaunchTooLarge;
  return launch(function, grid, block, arguments, shared_bytes, true);
}

}  // extern "C"
