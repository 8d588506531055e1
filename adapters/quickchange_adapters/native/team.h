// Work of one OpenMP region, cut into stages of units that whoever is free takes.
//
// A stage is over when all its units are done, not when all threads have come: a thread that the
// system has put aside holds up nobody, unless in the middle of a unit. Which thread does a unit never
// changes its result.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace quickchange {

class Team {
 public:
  Team(int num_stages, int num_threads)
      : num_stages_(num_stages), num_threads_(num_threads), done_(num_stages),
        next_(static_cast<std::size_t>(num_threads) * stride()) {}

  // Calls work(i) for every i in [0, count), each once over all threads, and returns when all are done.
  // Every thread goes through the same stages in the same order. Each begins with units of its own, in a row, and
  // then helps the others: so counters hardly travel between the cores. Whoever is free takes `run` units at once.
  template <typename Work>
  void share(int stage, int count, int run, Work&& work) {
    const int thread = omp_get_thread_num();
    int num_done = 0;
    for (int i = 0; i < num_threads_; ++i) {
      const int owner = thread + i < num_threads_ ? thread + i : thread + i - num_threads_;
      num_done += take(stage, owner, count, run, work);
    }
    std::atomic<int>& done = done_[stage].count;
    if (num_done) {
      done.fetch_add(num_done);
      if (num_sleeping_.load()) futex(&done, FUTEX_WAKE_PRIVATE, kEverybody);
    }
    wait(&done, count);
  }

  // The first unit of a thread's own.
  static int first_of(int thread, int num_threads, int count) {
    return static_cast<int>(static_cast<std::int64_t>(count) * thread / num_threads);
  }

 private:
  // Some tens of microseconds: a unit takes less, unless its thread was put aside.
  static constexpr int kSpins = 2000;
  static constexpr int kEverybody = 1 << 30;

  static constexpr int kCounters = 64 / sizeof(int);  // in a cache line

  struct alignas(64) Done {
    std::atomic<int> count{0};
  };

  // A thread's counters lie together, and no two threads' in one cache line.
  std::size_t stride() const {
    return static_cast<std::size_t>((num_stages_ + kCounters - 1) / kCounters + 1) * kCounters;
  }

  // Does what is left of one thread's own units; returns how many that were.
  template <typename Work>
  int take(int stage, int owner, int count, int run, Work& work) {
    std::atomic<int>& next = next_[owner * stride() + stage];
    const int first = first_of(owner, num_threads_, count), end = first_of(owner + 1, num_threads_, count);
    int num_done = 0;
    for (int i; (i = first + next.fetch_add(run, std::memory_order_relaxed)) < end;) {
      const int last = std::min(i + run, end);
      num_done += last - i;
      for (; i < last; ++i) work(i);
    }
    return num_done;
  }

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
  const int num_stages_, num_threads_;
  std::vector<Done> done_;
  std::vector<std::atomic<int>> next_;  // [threads, stages]: units of a thread's own that were taken
};

}  // namespace quickchange
