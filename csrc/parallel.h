// Threads of the CPU kernels. OpenMP where the compiler has it: torch's own OpenMP threads, still
// spinning after a matrix product, then are the threads that run the step, where a pool of our own
// would have to compete with them.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rmsgd {

// Calls work(thread, threads) on `threads` threads and waits for all of them.
template <class Work>
inline void parallel(int threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  work(0, 1);
}

}  // namespace rmsgd
