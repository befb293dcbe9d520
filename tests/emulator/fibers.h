// Many threads on one: every member of a team is a fiber, and between two meetings the fibers run one
// after the other in an order that the test chooses. Code that lacks a barrier gives another result in
// another order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace emulator {

enum Order { FORWARD, REVERSE, SHUFFLED };

// Where fibers meet. One that has ended is not waited for.
struct Meeting {
  int live = 0;
  int arrived = 0;
  int generation = 0;

  void release_if_complete() {
    if (arrived < live || live == 0) return;
    arrived = 0;
    ++generation;
  }
};

class Fibers {
 public:
  // resumed(k) is called before fiber k runs.
  Fibers(int count, Order order, std::function<void(int)> body, std::function<void(int)> resumed)
      : body_(std::move(body)),
        resumed_(std::move(resumed)),
        contexts_(count),
        jumps_(count),
        started_(count, false),
        ended_(count, false),
        order_(count) {
    std::iota(order_.begin(), order_.end(), 0);
    order_kind_ = order;
    if (order == REVERSE) std::vector<int>(order_.rbegin(), order_.rend()).swap(order_);
  }

  // Runs all fibers to their ends. Aborts when all of them wait for each other.
  void run() {
    for (int k = 0; k < int(contexts_.size()); ++k) start(k);
    std::mt19937 random(7);
    for (int left = int(contexts_.size()); left > 0;) {
      progress_ = false;
      if (order_kind_ == SHUFFLED) std::shuffle(order_.begin(), order_.end(), random);
      for (const int k : order_) {
        if (ended_[k]) continue;
        current_ = k;
        resumed_(k);
        resume(k);
        left -= ended_[k];
      }
      if (!progress_ && left > 0) {
        std::fprintf(stderr, "deadlock: a barrier is not reached by all members\n");
        std::abort();
      }
    }
  }

  int current() const { return current_; }
  void note_progress() { progress_ = true; }
  void yield() {
    if (_setjmp(jumps_[current_].buffer) == 0) _longjmp(main_, 1);
  }

  void wait(Meeting& meeting) {
    const int generation = meeting.generation;
    ++meeting.arrived;
    meeting.release_if_complete();
    progress_ = true;
    while (meeting.generation == generation) yield();
  }

 private:
  static constexpr std::size_t kStack = 256 * 1024;

  // makecontext gives a fiber its stack; from then on jumps, which unlike swapcontext need no system call.
  void resume(int k) {
    if (_setjmp(main_) != 0) return;
    if (started_[k]) _longjmp(jumps_[k].buffer, 1);
    started_[k] = true;
    setcontext(&contexts_[k]);
  }

  void start(int k) {
    stacks_.emplace_back(new char[kStack]);
    getcontext(&contexts_[k]);
    contexts_[k].uc_stack.ss_sp = stacks_.back().get();
    contexts_[k].uc_stack.ss_size = kStack;
    contexts_[k].uc_link = nullptr;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&contexts_[k], reinterpret_cast<void (*)()>(&enter), 3, int(self & 0xffffffff),
                int(self >> 32), k);
  }

  static void enter(unsigned low, unsigned high, int k) {
    Fibers* const self = reinterpret_cast<Fibers*>(std::uintptr_t(low) | std::uintptr_t(high) << 32);
    self->body_(k);
    self->ended_[k] = true;
    self->progress_ = true;
    _longjmp(self->main_, 1);
  }

  struct Jump {
    jmp_buf buffer;
  };

  std::function<void(int)> body_, resumed_;
  std::vector<ucontext_t> contexts_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Jump> jumps_;
  std::vector<char> started_, ended_;
  std::vector<int> order_;
  Order order_kind_;
  jmp_buf main_;
  int current_ = 0;
  bool progress_ = false;
};

}  // namespace emulator
