// Scratch memory of one call, and the few helpers that every kernel shares.
#pragma once

#include "abi.h"
#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparseflow::SF_NAMESPACE {

SF_INLINE int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

SF_INLINE int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Hands out 64-byte aligned pieces of one workspace. With a null base it only adds sizes up.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class U>
  U* take(int64_t n) {
    const uintptr_t at = base_ + used_;
    used_ += (uint64_t(n) * sizeof(U) + 63) / 64 * 64;
    return reinterpret_cast<U*>(at);
  }

  int64_t used() const { return int64_t(used_); }

 private:
  uintptr_t base_;
  uint64_t used_ = 0;
};

// The bias of every group, widened and padded with zeros to whole blocks; zeros where there is no bias.
template <class T>
typename T::Acc* pad_bias(const void* bias, int64_t groups, int64_t outputs, int64_t padded, typename T::Acc* to) {
  const auto* from = static_cast<const typename T::Element*>(bias);
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t c = 0; c < padded; c++) {
      to[g * padded + c] = bias && c < outputs ? to_acc<T>(from[g * outputs + c]) : 0;
    }
  }
  return to;
}

}  // namespace sparseflow::SF_NAMESPACE
