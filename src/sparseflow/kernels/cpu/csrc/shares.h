// Work handed out to threads.
#pragma once

#include "arena.h"

namespace sparseflow::SF_NAMESPACE {

// Numbers in as many ranges as there are threads. Each takes those of its own range in order, and then what is left of the
// others': costs are estimates, and cores are not alike or have other work to do.
class Shares {
 public:
  void place(Arena& arena, int threads) {
    shares_ = arena.take<Share>(threads);
    threads_ = threads;
  }

  // Not while anybody takes from it.
  void set(int64_t thread, int64_t begin, int64_t end) const { shares_[thread] = {begin, end}; }

  // The next one for a thread; -1 when there are no more. As many threads as there are may ask, or fewer.
  int64_t take(int thread) const {
    for (int i = 0; i < threads_; i++) {
      Share& share = shares_[(thread + i) % threads_];
      if (__atomic_load_n(&share.next, __ATOMIC_RELAXED) >= share.end) continue;
      const int64_t found = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
      if (found < share.end) return found;
    }
    return -1;
  }

 private:
  struct alignas(64) Share {  // a cache line each
    int64_t next, end;
  };

  Share* shares_;
  int threads_;
};

}  // namespace sparseflow::SF_NAMESPACE
