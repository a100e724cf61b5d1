// Tasks on several threads, free of torch: the caller brings the threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fisherprune::cpu {

// Runs the body over all of [0, count) in disjoint pieces, each on some thread, and
// waits for the end of all.
using Body = std::function<void(int64_t first, int64_t last)>;
using Parallel = std::function<void(int64_t count, const Body& body)>;

// Calls work(i, own) once for each i in [0, count). Every thread takes the next task
// when it is free: a thread that the system delays does not hold up the others. A
// thread makes its `own` by begin() before its first task, and calls end(own) after its
// last one.
template <class Begin, class Work, class End>
void for_each_task(const Parallel& parallel, int64_t count, const Begin& begin,
                   const Work& work, const End& end) {
  std::atomic<int64_t> next{0};
  parallel(count, [&](int64_t, int64_t) {
    auto own = begin();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      work(i, own);
    end(own);
  });
}

// Calls work(i) once for each i in [0, count).
template <class Work>
void for_each_task(const Parallel& parallel, int64_t count, const Work& work) {
  for_each_task(
      parallel, count, [] { return 0; }, [&](int64_t i, int) { work(i); }, [](int) {});
}

}  // namespace fisherprune::cpu
