// Memory for vectors, which begins with a line of the cache.
#pragma once

#include <cstdlib>
#include <memory>

namespace rmsgd {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Memory = std::unique_ptr<T, Free>;

// So many bytes, or null where there is no room for them.
template <class T>
Memory<T> allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) return nullptr;
  return Memory<T>(static_cast<T*>(memory));
}

}  // namespace rmsgd
