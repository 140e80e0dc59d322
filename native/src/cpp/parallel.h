// Tasks on a pool of threads that others use, too.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace mam {

constexpr int kSpins = 2000;  // some ten microseconds

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls run(task, worker) for every task; `worker` is below `max_workers`, and no two calls at a time have the same.
//
// The caller takes part, and waits only for tasks that were claimed: it depends on no thread of the pool, all of which
// may be waiting likewise. One that comes late finds nothing to claim and touches nothing of the caller's.
//
// A pool has num_threads() and Schedule(function).
template <class Pool, class Run>
void for_all_tasks(Pool& pool, int64_t tasks, int64_t max_workers, const Run& run) {
  const int64_t workers = std::min({tasks, max_workers, std::max<int64_t>(1, pool.num_threads())});
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task, 0);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto shared = std::make_shared<Shared>();
  const Run* const own = &run;
  const auto work = [shared, own, tasks](int64_t worker) {
    for (;;) {
      const int64_t task = shared->next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      (*own)(task, worker);
      if (shared->done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_all();
      }
    }
  };
  for (int64_t worker = 1; worker < workers; ++worker) pool.Schedule([work, worker] { work(worker); });
  work(0);
  // Others are mostly about to be done, and falling asleep takes longer.
  for (int spin = 0; spin < kSpins && shared->done.load(std::memory_order_acquire) < tasks; ++spin) relax();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load(std::memory_order_acquire) == tasks; });
}

}  // namespace mam
