// A team of threads within one OpenMP region: a barrier that spins, and work handed out by counters.
//
// Which thread does a piece of work never changes its result, so work is taken by whoever is free.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <vector>

namespace quickchange {

class Team {
 public:
  explicit Team(int num_stages) : next_(num_stages) {}

  // Says how many threads there really are; before any of them waits.
  void set_size(int num_threads) { num_threads_ = num_threads; }

  int size() const { return num_threads_; }

  // Waits until all threads of the team are here. Spins, since stages are microseconds apart; yields
  // when somebody else has taken the core of the thread that is missing.
  void wait() {
    if (num_threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

  // Calls work(i) for every i in [0, count), each once over all threads. `stage` is used once.
  template <typename Work>
  void share(int stage, int count, Work&& work) {
    for (;;) {
      const int i = next_[stage].value.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      work(i);
    }
  }

 private:
  static constexpr int kSpins = 20000;
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  int num_threads_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  std::vector<Counter> next_;
};

}  // namespace quickchange
