// Event-driven linear layer for few rows: the weight rows of the active inputs are streamed once, eight at a time, into
// sums that stay in L1. Memory bandwidth is the limit, so rows are long and contiguous and the next ones prefetched.
#pragma once

#include "abi.h"
#include "arena.h"
#include "events.h"
#include "simd.h"
#include "store.h"

namespace sparseflow::SF_NAMESPACE {

template <class T>
class Linear {
  using Element = typename T::Element;
  using Acc = typename T::Acc;
  using Vec = typename T::Vec;
  static constexpr int L = kLanes<T>;
  static constexpr int kTogether = 8;  // weight rows added per pass over the sums
  static constexpr int64_t kStep = kInterleaved<T> ? 2 * kInterleave : L;  // channels at a time
  static constexpr int kVectors = kStep / L;

 public:
  Linear(const SfLinear& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
         const void* bias, void* out, bool graded, int threads)
      : p_(p),
        x_(static_cast<const Element*>(x)),
        bits_(bits),
        row_counts_(row_counts),
        packed_(static_cast<const char*>(packed)),
        bias_source_(bias),
        out_(static_cast<Element*>(out)),
        graded_(graded),
        threads_(threads),
        words_(ceil_div(p.in_features, 64)),
        slabs_(ceil_div(words_, p.slab)),
        blocks_(ceil_div(p.out_features, p.block)),
        row_bytes_(p.block * int64_t(sizeof(Element))) {
    events_ = 0;
    for (int64_t r = 0; r < p_.rows; r++) events_ += row_counts_[r];
  }

  int run() {
    Arena sizes(nullptr);
    place(sizes);
    void* memory = sf_workspace(sizes.used());
    if (memory == nullptr) return 1;
    Arena arena(memory);
    place(arena);
    pad_bias<T>(bias_source_, 1, p_.out_features, blocks_ * p_.block, bias_);
    int64_t at = 0;
    for (int64_t r = 0; r < p_.rows; r++) at = append_row(r, at);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t b = 0; b < blocks_; b++) add_block(b, sums_ + thread_index() * p_.rows * p_.block);
    return 0;
  }

 private:
  void place(Arena& arena) {
    bias_ = arena.take<Acc>(blocks_ * p_.block);
    entries_ = arena.take<uint32_t>(events_ + kListSlack);
    values_ = graded_ ? arena.take<Acc>(events_ + kListSlack) : nullptr;
    starts_ = arena.take<uint32_t>(p_.rows * (slabs_ + 1));
    sums_ = arena.take<Acc>(threads_ * p_.rows * p_.block);
  }

  int64_t append_row(int64_t r, int64_t at) const {
    uint32_t* starts = starts_ + r * (slabs_ + 1);
    uint32_t* entry = entries_ + at;
    Acc* value = graded_ ? values_ + at : nullptr;
    for (int64_t w = 0; w < words_; w++) {
      if (w % p_.slab == 0) *starts++ = uint32_t(entry - entries_);
      const uint64_t bits = bits_[r * words_ + w];
      if (graded_) value = append_values<T>(bits, x_ + r * p_.in_features + 64 * w, 1, value);
      entry = append_events(bits, uint32_t(64 * w * row_bytes_), uint32_t(row_bytes_), entry);
    }
    *starts = uint32_t(entry - entries_);
    return entry - entries_;
  }

  void add_block(int64_t b, Acc* sums) const {
    const char* weights = packed_ + b * p_.in_features * row_bytes_;
    for (int64_t r = 0; r < p_.rows; r++) {
      __builtin_memcpy(sums + r * p_.block, bias_ + b * p_.block, p_.block * sizeof(Acc));
    }
    for (int64_t slab = 0; slab < slabs_; slab++) {
      for (int64_t r = 0; r < p_.rows; r++) {
        const uint32_t* starts = starts_ + r * (slabs_ + 1) + slab;
        if (graded_) {
          add_rows<true>(weights, starts[0], starts[1], sums + r * p_.block);
        } else {
          add_rows<false>(weights, starts[0], starts[1], sums + r * p_.block);
        }
      }
    }
    const int64_t channel = b * p_.block, valid = min(p_.block, p_.out_features - channel);
    store_channels_last<T>(sums, p_.block, p_.rows, valid, out_ + channel, p_.out_features);
  }

  template <bool kGraded>
  void add_rows(const char* weights, uint32_t first, uint32_t last, Acc* sums) const {
    uint32_t i = first;
    for (; i + kTogether <= last; i += kTogether) {
      const Element* rows[kTogether];
      const Element* next[kTogether];
#pragma GCC unroll 8
      for (int k = 0; k < kTogether; k++) {
        rows[k] = reinterpret_cast<const Element*>(weights + entries_[i + k]);
        next[k] = reinterpret_cast<const Element*>(weights + entries_[min(i + kTogether + k, last - 1)]);
      }
      for (int64_t c = 0; c < p_.block; c += kStep) add_together<kGraded>(rows, next, c, values_ + i, sums + c);
    }
    for (; i < last; i++) {
      const auto* row = reinterpret_cast<const Element*>(weights + entries_[i]);
      for (int64_t c = 0; c < p_.block; c += kStep) {
        Vec w[kVectors];
        load_weights<T, kVectors>(row + c, w);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) {
          const Vec sum = load<Vec>(sums + c + v * L);
          store(sums + c + v * L, kGraded ? multiply_add(w[v], splat<T>(values_[i]), sum) : sum + w[v]);
        }
      }
    }
  }

  template <bool kGraded>
  SF_INLINE_MEMBER void add_together(const Element* const (&rows)[kTogether], const Element* const (&next)[kTogether],
                                     int64_t c, const Acc* values, Acc* sums) const {
    Vec terms[kTogether][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kTogether; k++) {
      load_weights<T, kVectors>(rows[k] + c, terms[k]);
      __builtin_prefetch(next[k] + c);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) {
      if constexpr (kGraded) {
#pragma GCC unroll 8
        for (int k = 0; k < kTogether; k++) terms[k][v] *= splat<T>(values[k]);
      }
      const Vec low = (terms[0][v] + terms[1][v]) + (terms[2][v] + terms[3][v]);
      const Vec high = (terms[4][v] + terms[5][v]) + (terms[6][v] + terms[7][v]);
      store(sums + v * L, load<Vec>(sums + v * L) + (low + high));
    }
  }

  const SfLinear& p_;
  const Element* x_;
  const uint64_t* bits_;
  const uint32_t* row_counts_;
  const char* packed_;
  const void* bias_source_;
  Element* out_;
  const bool graded_;
  const int threads_;
  const int64_t words_, slabs_, blocks_, row_bytes_;
  int64_t events_;
  Acc* bias_;
  uint32_t* entries_;
  Acc* values_;
  uint32_t* starts_;
  Acc* sums_;
};

}  // namespace sparseflow::SF_NAMESPACE
