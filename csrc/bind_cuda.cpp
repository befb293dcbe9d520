// rmsgd._cuda: launches of the CUDA kernels that nvcc compiled. rmsgd/_cuda.pyi says what each function
// takes, gives and raises. What is launched when is decided in rmsgd/backends, in one place for these
// kernels and for those that NVRTC compiles at run time.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels_cuda.h"

namespace py = pybind11;
using namespace pybind11::literals;

// The host's side of a kernel is a function of the kernel's name, defined by nvcc.
#define RMSGD_DECLARE(name, Arguments) extern "C" void name(Arguments);
RMSGD_KERNELS(RMSGD_DECLARE)
#undef RMSGD_DECLARE

namespace {

void check(cudaError_t status, const std::string& doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it clears the error, which the next call would report again
  throw std::runtime_error(doing + ": " + cudaGetErrorString(status));
}

struct Kernel {
  const void* function;
  std::size_t argument_bytes;
};

Kernel kernel(const std::string& name) {
#define RMSGD_FIND(known, Arguments) \
  if (name == #known) return {reinterpret_cast<const void*>(&known), sizeof(Arguments)};
  RMSGD_KERNELS(RMSGD_FIND)
#undef RMSGD_FIND
  throw py::key_error("no kernel is called " + name);
}

// A function of the driver, which the runtime has loaded.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error(std::string(name) + " is not in this driver");
  }
  return reinterpret_cast<Function>(found);
}

// The thread's current context as the driver knows it; there may be none.
struct CurrentContext {
  int (*get)(void** context) = driver_function<int (*)(void**)>("cuCtxGetCurrent");
  int (*set)(void* context) = driver_function<int (*)(void*)>("cuCtxSetCurrent");

  static const CurrentContext& functions() {
    static const CurrentContext found;
    return found;
  }
};

// Makes a device current, and at the end restores the context from before. It does not restore the device: if
// there was no context, that would create one, half a gigabyte on device 0 for a model on another device.
class OnDevice {
 public:
  explicit OnDevice(int device) : current_(CurrentContext::functions()) {
    if (current_.get(&before_) != 0) throw std::runtime_error("asking for the current context");
    check(cudaSetDevice(device), "choosing device " + std::to_string(device));
  }
  ~OnDevice() { current_.set(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const CurrentContext& current_;
  void* before_ = nullptr;
};

// Raises the limit of a kernel's shared memory. It is never lowered, since another thread may be about to
// launch the kernel.
void allow_shared(const Kernel& chosen, int device, int shared_bytes, const std::string& name) {
  constexpr int WITHOUT_ASKING = 48 * 1024;
  static std::mutex guard;
  static std::map<std::pair<const void*, int>, int> allowed;
  if (shared_bytes <= WITHOUT_ASKING) return;
  const std::lock_guard<std::mutex> one_at_a_time(guard);
  int& before = allowed[{chosen.function, device}];
  if (shared_bytes <= before) return;
  check(cudaFuncSetAttribute(chosen.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        name + ": asking for " + std::to_string(shared_bytes) + " bytes of shared memory");
  before = shared_bytes;
}

void launch(const std::string& name, int device, std::int64_t blocks, int threads, int shared_bytes,
            std::uintptr_t stream, const py::buffer& arguments, bool cooperative) {
  const Kernel chosen = kernel(name);
  const py::buffer_info bytes = arguments.request();
  if (!PyBuffer_IsContiguous(bytes.view(), 'C')) throw py::value_error("arguments: not contiguous");
  if (std::size_t(bytes.size * bytes.itemsize) != chosen.argument_bytes) {
    throw py::value_error("arguments: " + name + " takes " + std::to_string(chosen.argument_bytes) +
                          " bytes, got " + std::to_string(bytes.size * bytes.itemsize));
  }
  if (blocks < 1 || blocks > 0x7fffffff) {
    throw py::value_error("blocks: expected 1 to 2147483647, got " + std::to_string(blocks));
  }
  if (threads < 1 || threads > 1024) {
    throw py::value_error("threads: expected 1 to 1024, got " + std::to_string(threads));
  }
  if (shared_bytes < 0) throw py::value_error("shared_bytes: negative");
  // A launch waits while the device's queue is full, and the first launch loads the kernel.
  const py::gil_scoped_release others_may_run;
  const OnDevice on(device);
  allow_shared(chosen, device, shared_bytes, name);
  void* parameters[] = {bytes.ptr};
  const dim3 grid{unsigned(blocks)}, block{unsigned(threads)};
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  check(cooperative
            ? cudaLaunchCooperativeKernel(chosen.function, grid, block, parameters, std::size_t(shared_bytes),
                                          queue)
            : cudaLaunchKernel(chosen.function, grid, block, parameters, std::size_t(shared_bytes), queue),
        name);
}

int resident_blocks(const std::string& name, int device, int threads, int shared_bytes) {
  const Kernel chosen = kernel(name);
  const py::gil_scoped_release others_may_run;
  const OnDevice on(device);
  allow_shared(chosen, device, shared_bytes, name);
  int each = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, chosen.function, threads,
                                                      std::size_t(shared_bytes)),
        name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  return each * multiprocessors;
}

py::tuple attributes(int device) {
  const auto value = [&](cudaDeviceAttr attribute) {
    int found = 0;
    check(cudaDeviceGetAttribute(&found, attribute, device), "asking for a device's attributes");
    return found;
  };
  return py::make_tuple(value(cudaDevAttrMultiProcessorCount), value(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        value(cudaDevAttrMaxSharedMemoryPerMultiprocessor), value(cudaDevAttrL2CacheSize),
                        value(cudaDevAttrClockRate), value(cudaDevAttrMemoryClockRate),
                        value(cudaDevAttrGlobalMemoryBusWidth));
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "looking for GPUs");
  return count;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of rmsgd.";
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.attr("ARCHITECTURES") = RMSGD_CUDA_ARCHITECTURES;
  m.def("device_count", &device_count);
  m.def("attributes", &attributes, "device"_a);
  m.def("argument_bytes", [](const std::string& name) { return kernel(name).argument_bytes; }, "name"_a);
  m.def("resident_blocks", &resident_blocks, "name"_a, "device"_a, "threads"_a, "shared_bytes"_a);
  m.def("launch", &launch, "name"_a, "device"_a, "blocks"_a, "threads"_a, "shared_bytes"_a, "stream"_a,
        "arguments"_a, "cooperative"_a = false);
}
