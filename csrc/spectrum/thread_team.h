// Several threads working on one matrix: they meet at barriers.
#pragma once

#include <sched.h>

#include "../team.h"

namespace rmsgd {

// One counter per meeting place. A thread spins a little, then yields, so that a machine with more
// threads than cores goes on.
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

class ThreadTeam {
 public:
  RMSGD_FN ThreadTeam(int rank, int size, Barrier* meeting) : rank_(rank), size_(size), meeting_(meeting) {}

  RMSGD_FN int rank() const { return rank_; }
  RMSGD_FN int size() const { return size_; }

  RMSGD_FN void barrier() const {
    if (size_ == 1) return;
    const unsigned generation = __atomic_load_n(&meeting_->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&meeting_->arrived, 1, __ATOMIC_ACQ_REL) == size_) {
      __atomic_store_n(&meeting_->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&meeting_->generation, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&meeting_->generation, __ATOMIC_ACQUIRE) == generation; ++spins) {
      if (spins >= 4096) sched_yield();
    }
  }

 private:
  int rank_, size_;
  Barrier* meeting_;
};

}  // namespace rmsgd
