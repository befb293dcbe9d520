// rmsgd._cuda: launches of the CUDA kernels that nvcc compiled. rmsgd/_cuda.pyi says what each function
// takes, gives and raises. What is launched when is decided in rmsgd/backends, in one place for these
// kernels and for those that NVRTC compiles at run time.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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
  cudaGetLastError();  // an error that is reported is not met again by the next call
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

// Makes a device current, and the one before it again at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) check(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

void allow_shared(const Kernel& chosen, int shared_bytes, const std::string& name) {
  constexpr int WITHOUT_ASKING = 48 * 1024;
  if (shared_bytes <= WITHOUT_ASKING) return;
  check(cudaFuncSetAttribute(chosen.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        name + ": asking for " + std::to_string(shared_bytes) + " bytes of shared memory");
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
  const OnDevice on(device);
  allow_shared(chosen, shared_bytes, name);
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
  const OnDevice on(device);
  allow_shared(chosen, shared_bytes, name);
  int each = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, chosen.function, threads,
                                                      std::size_t(shared_bytes)),
        name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  return each * multiprocessors;
}

py::tuple shared_memory(int device) {
  int block = 0, multiprocessor = 0;
  check(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  check(cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "shared memory");
  return py::make_tuple(block, multiprocessor);
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
  m.def("shared_memory", &shared_memory, "device"_a);
  m.def("argument_bytes", [](const std::string& name) { return kernel(name).argument_bytes; }, "name"_a);
  m.def("resident_blocks", &resident_blocks, "name"_a, "device"_a, "threads"_a, "shared_bytes"_a);
  m.def("launch", &launch, "name"_a, "device"_a, "blocks"_a, "threads"_a, "shared_bytes"_a, "stream"_a,
        "arguments"_a, "cooperative"_a = false);
}
