// Work of one OpenMP region, cut into stages of units that whoever is free takes.
//
// A stage is over when all its units are done, not when all threads have come: a thread that the
// system has put aside holds up nobody, unless in the middle of a unit. Which thread does a unit never
// changes its result.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace quickchange {

class Team {
 public:
  explicit Team(int num_stages) : stages_(num_stages) {}

  // Calls work(i) for every i in [0, count), each once over all threads, and returns when all are done.
  // Every thread goes through the same stages in the same order. Whoever is free takes `run` units in a
  // row: small ones are then not paid for with the counter's way between the cores.
  template <typename Work>
  void share(int stage, int count, int run, Work&& work) {
    Stage& shared = stages_[stage];
    int num_done = 0;
    for (int i; (i = shared.next.fetch_add(run, std::memory_order_relaxed)) < count;) {
      const int end = std::min(i + run, count);
      num_done += end - i;
      for (; i < end; ++i) work(i);
    }
    if (num_done) {
      shared.done.fetch_add(num_done);
      if (num_sleeping_.load()) futex(&shared.done, FUTEX_WAKE_PRIVATE, kEverybody);
    }
    wait(&shared.done, count);
  }

 private:
  // Some tens of microseconds: a unit takes less, unless its thread was put aside.
  static constexpr int kSpins = 2000;
  static constexpr int kEverybody = 1 << 30;

  struct alignas(64) Stage {
    std::atomic<int> next{0};
    std::atomic<int> done{0};
  };

  void wait(std::atomic<int>* done, int count) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (done->load(std::memory_order_acquire) >= count) return;
      _mm_pause();
    }
    // Whoever finishes a unit from now on sees a sleeper, or this sees the unit.
    num_sleeping_.fetch_add(1);
    for (int seen; (seen = done->load()) < count;) futex(done, FUTEX_WAIT_PRIVATE, seen);
    num_sleeping_.fetch_sub(1);
  }

  static void futex(std::atomic<int>* address, int operation, int value) {
    static_assert(sizeof(std::atomic<int>) == sizeof(int));
    syscall(SYS_futex, reinterpret_cast<int*>(address), operation, value, nullptr, nullptr, 0);
  }

  alignas(64) std::atomic<int> num_sleeping_{0};
  std::vector<Stage> stages_;
};

}  // namespace quickchange
