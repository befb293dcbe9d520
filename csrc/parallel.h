// Threads of the CPU kernels. They are OpenMP's where the compiler has it: then torch's own OpenMP threads,
// which still spin after a matrix product, run the step, while a separate pool would have to compete with
// them. Elsewhere, and in a forked child, they are threads of the standard library.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rmsgd {

// The most threads that are used, since a system may end a process that asks for too many.
constexpr int MOST_THREADS = 1024;

// Whether this process was forked from one that had loaded the core. The threads of OpenMP stay behind
// in the parent, and GNU's runtime waits for them in the child for ever.
bool is_forked_child();

// Calls work(thread, threads) on up to `threads` new threads, as many as the system gives.
template <class Work>
inline void on_new_threads(int threads, const Work& work) {
  std::atomic<int> size{0};  // it is set once the last thread has started
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (int(others.size()) < threads - 1) {
      others.emplace_back([&size, &work, thread = int(others.size()) + 1] {
        int known;
        while ((known = size.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
        work(thread, known);
      });
    }
  } catch (const std::system_error&) {  // at a limit of the system, the threads that have started do the work
  }
  size.store(int(others.size()) + 1, std::memory_order_release);
  work(0, int(others.size()) + 1);
  for (std::thread& thread : others) thread.join();
}

// Calls work(thread, threads) on up to `threads` threads and waits for all of them. No more than `pieces` of
// them have something to do. The work must not throw.
template <class Work>
inline void parallel(int threads, std::int64_t pieces, const Work& work) {
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (threads <= 1 || pieces <= 1) {
    work(0, 1);
    return;
  }
#if defined(_OPENMP)
  if (!is_forked_child()) {
    // A region always uses all of them: GNU's runtime ends the threads of its pool that a region leaves out,
    // and torch's next operation would have to start them anew.
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  on_new_threads(pieces < threads ? int(pieces) : threads, work);
}

}  // namespace rmsgd
