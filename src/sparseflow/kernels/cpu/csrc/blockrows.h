// Event-driven linear layer for few rows, with a weight of which whole blocks of 16 x 16 are zero: what is left of the
// weight row of an active input is one contiguous run, 16 outputs of every present block side by side, and is streamed
// into sums that stay in L1. The counterpart of linear.h; with many rows blocksparse.h shares what it loads.
#pragma once

#include "abi.h"
#include "arena.h"
#include "events.h"
#include "simd.h"
#include "store.h"

namespace sparseflow::SF_NAMESPACE {

template <class T>
class BlockRows {
  using Element = typename T::Element;
  using Acc = typename T::Acc;
  using Vec = typename T::Vec;
  static constexpr int64_t kBlock = 16;
  static constexpr int V = kBlock / kLanes<T>;

 public:
  // index: [first block of every 16 inputs, and an end][output block of every block].
  BlockRows(const SfLinear& p, const void* x, const uint64_t* bits, const void* packed, const int32_t* index,
            const void* bias, void* out, bool graded, int threads)
      : p_(p),
        x_(static_cast<const Element*>(x)),
        bits_(bits),
        packed_(static_cast<const Element*>(packed)),
        bias_source_(bias),
        out_(static_cast<Element*>(out)),
        graded_(graded),
        threads_(threads),
        input_blocks_(ceil_div(p.in_features, kBlock)),
        output_blocks_(ceil_div(p.out_features, kBlock)),
        starts_(index),
        outputs_(index + input_blocks_ + 1) {}

  int run() {
    Arena sizes(nullptr);
    place(sizes);
    void* memory = sf_workspace(sizes.used());
    if (memory == nullptr) return 1;
    Arena arena(memory);
    place(arena);
    pad_bias<T>(bias_source_, 1, p_.out_features, output_blocks_ * kBlock, bias_);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int i = 0; i < threads_; i++) {
      const int64_t first = i * output_blocks_ / threads_, end = (i + 1) * output_blocks_ / threads_;
      for (int64_t r = 0; r < p_.rows && first < end; r++) add_row(r, first, end);
    }
    return 0;
  }

 private:
  void place(Arena& arena) {
    bias_ = arena.take<Acc>(output_blocks_ * kBlock);
    sums_ = arena.take<Acc>(output_blocks_ * kBlock);
  }

  // The sums of one row in output blocks first .. end.
  void add_row(int64_t r, int64_t first, int64_t end) const {
    __builtin_memset(sums_ + first * kBlock, 0, (end - first) * kBlock * sizeof(Acc));
    for (int64_t w = 0; w < ceil_div(p_.in_features, 64); w++) {
      uint64_t word = bits_[r * ceil_div(p_.in_features, 64) + w];
      for (int64_t b = 4 * w; word != 0; b++, word >>= kBlock) {
        if ((word & 0xffff) == 0) continue;
        const int32_t* begin = first == 0 ? outputs_ + starts_[b] : place_of(b, first);
        const int32_t* stop = end == output_blocks_ ? outputs_ + starts_[b + 1] : place_of(b, end);
        if (begin < stop) add_events(uint32_t(word & 0xffff), x_ + r * p_.in_features + b * kBlock, b, begin, stop);
      }
    }
    for (int64_t c = first * kBlock; c < end * kBlock; c++) sums_[c] += bias_[c];
    const int64_t channel = first * kBlock, valid = min(end * kBlock, p_.out_features) - channel;
    store_channels_last<T>(sums_ + channel, 0, 1, valid, out_ + r * p_.out_features + channel, 0);
  }

  // The first block of input block b that belongs to `output` or a later one.
  const int32_t* place_of(int64_t b, int64_t output) const {
    const int32_t *low = outputs_ + starts_[b], *high = outputs_ + starts_[b + 1];
    while (low < high) {
      const int32_t* middle = low + (high - low) / 2;
      if (*middle < output) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The events of 16 inputs, four at a time, in the blocks begin .. stop.
  void add_events(uint32_t bits, const Element* x, int64_t b, const int32_t* begin, const int32_t* stop) const {
    const int64_t blocks = starts_[b + 1] - starts_[b];
    const Element* weights = packed_ + (starts_[b] * kBlock * kBlock + (begin - outputs_ - starts_[b]) * kBlock);
    while (bits != 0) {
      const Element* rows[4];
      Acc values[4];
      int n = 0;
      for (; n < 4 && bits != 0; n++, bits &= bits - 1) {
        const int c = lowest_bit(bits);
        rows[n] = weights + c * blocks * kBlock;
        values[n] = graded_ ? to_acc<T>(x[c]) : 0;
      }
      if (n == 4) add_some<4>(rows, values, begin, stop);
      if (n == 3) add_some<3>(rows, values, begin, stop);
      if (n == 2) add_some<2>(rows, values, begin, stop);
      if (n == 1) add_some<1>(rows, values, begin, stop);
    }
  }

  template <int N>
  void add_some(const Element* const (&rows)[4], const Acc (&values)[4], const int32_t* block,
                const int32_t* stop) const {
    if (graded_) {
      add_rows<N, true>(rows, values, block, stop);
    } else {
      add_rows<N, false>(rows, values, block, stop);
    }
  }

  template <int N, bool kGraded>
  SF_INLINE_MEMBER void add_rows(const Element* const (&rows)[4], const Acc (&values)[4], const int32_t* block,
                                 const int32_t* stop) const {
    for (int64_t at = 0; block < stop; block++, at += kBlock) {
      Acc* to = sums_ + *block * kBlock;
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        Vec sum = load<Vec>(to + v * kLanes<T>);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
          const Vec weight = T::widen(rows[i] + at + v * kLanes<T>);
          sum = kGraded ? multiply_add(weight, splat<T>(values[i]), sum) : sum + weight;
        }
        store(to + v * kLanes<T>, sum);
      }
    }
  }

  const SfLinear& p_;
  const Element* x_;
  const uint64_t* bits_;
  const Element* packed_;
  const void* bias_source_;
  Element* out_;
  const bool graded_;
  const int threads_;
  const int64_t input_blocks_, output_blocks_;
  const int32_t* starts_;
  const int32_t* outputs_;
  Acc* bias_;
  Acc* sums_;
};

}  // namespace sparseflow::SF_NAMESPACE
