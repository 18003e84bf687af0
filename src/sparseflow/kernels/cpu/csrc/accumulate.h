// Stage 2: walk the lists of events and add the weight rows into registers.
//
// By *windows*, each output pixel walks the part of its row's list that it sees, and takes one weight row of an entry. By
// *columns*, the list is walked once: an entry's weight rows for all the pixels that see it lie side by side, and are added
// to the sums of those pixels, which are all in registers. That reads fewer entries, and the weights in longer pieces. Both
// add the same terms in the same order (windows of 64 channels and more).
#pragma once

#include <type_traits>

#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

// A pass over one output row: `pixels` windows of one list, into Q packed blocks of output channels.
template <class T>
struct RowPass {
  const char* weights;      // first packed row of the first block
  int64_t block_bytes;      // distance between packed blocks
  const uint32_t* entries;
  const typename T::Acc* values;
  const uint32_t* starts;
  const uint32_t* windows;  // per pixel: first column of its window, as an index into starts
  const int64_t* shifts;    // per pixel: bytes to subtract from the weight pointer
  int64_t kernel_columns;
  int64_t blocks, row_bytes;  // how many packed blocks, and bytes of one weight row; by columns
  int64_t pixels;
  const typename T::Acc* from;  // initial sums: zeros (from_step 0) or an earlier pass's sums
  int64_t from_step;
  const typename T::Acc* bias;  // added last, so that rounding follows the size of the sum; zeros in earlier passes
  typename T::Acc* to;
  int64_t to_step;
};

template <class T, int V, int Q, bool kGraded>
SF_INLINE void add_row(const char* const (&base)[Q], uint32_t offset, typename T::Acc value,
                       typename T::Vec (&sums)[V * Q]) {
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
    typename T::Vec weights[V];
    load_weights<T, V>(reinterpret_cast<const typename T::Element*>(base[q] + offset), weights);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      typename T::Vec& sum = sums[q * V + v];
      sum = kGraded ? multiply_add(weights[v], splat<T>(value), sum) : sum + weights[v];
    }
  }
}

// V vectors per packed block, Q blocks at once. Narrow passes keep several independent chains of additions, so that
// their latency overlaps; which entry goes to which chain depends on its place in the list only, so that results do
// not depend on threads or tiles.
template <class T, int V, int Q, bool kGraded>
void accumulate_row(const RowPass<T>& pass) {
  constexpr int kSums = V * Q;
  constexpr int kChains = kSums >= 4 ? 1 : 4 / kSums;
  constexpr int kUnroll = kChains > 2 ? kChains : 2;
  using Vec = typename T::Vec;
  const RowPass<T> a = pass;  // a local copy: stores through `to` cannot alias it
  const typename T::Acc* from = a.from;
  typename T::Acc* to = a.to;
  for (int64_t p = 0; p < a.pixels; p++, from += a.from_step, to += a.to_step) {
    const uint32_t* window = a.starts + a.windows[p];
    const uint32_t* e = a.entries + window[0];
    const uint32_t* const end = a.entries + window[a.kernel_columns];
    const typename T::Acc* value = kGraded ? a.values + window[0] : nullptr;
    const char* base[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
      base[q] = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(a.weights) + q * a.block_bytes - a.shifts[p]);
    }
    Vec sums[kChains][kSums] = {};
#pragma GCC unroll 16
    for (int v = 0; v < kSums; v++) sums[0][v] = load<Vec>(from + v * kLanes<T>);
    for (; e + kUnroll <= end; e += kUnroll) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnroll; i++) {
        add_row<T, V, Q, kGraded>(base, e[i], kGraded ? value[i] : 0, sums[i % kChains]);
      }
      if (kGraded) value += kUnroll;
    }
    for (; e < end; e++) add_row<T, V, Q, kGraded>(base, *e, kGraded ? *value++ : 0, sums[0]);
#pragma GCC unroll 16
    for (int v = 0; v < kSums; v++) {
      Vec sum = sums[0][v];
#pragma GCC unroll 4
      for (int i = 1; i < kChains; i++) sum += sums[i][v];
      store(to + v * kLanes<T>, sum + load<Vec>(a.bias + v * kLanes<T>));
    }
  }
}

template <class T>
using AccumulateRow = void (*)(const RowPass<T>&);

// ---- by columns --------------------------------------------------------------------------------------------------

#if defined(SF_AVX512) || defined(__aarch64__)
constexpr int kMaxColumnVectors = 24;  // accumulators of a walk by columns; some registers are left for weights
#else
constexpr int kMaxColumnVectors = 12;
#endif

// K taps at a stride of S, V vectors of output channels. sums[i] belongs to the i-th last pixel that has begun: of column
// j, a pixel's j-th from its own first, tap (j mod S) + i * S leads there.
template <class T, int K, int S, int V, bool kGraded>
class ColumnWalk {
  using Acc = typename T::Acc;
  using Vec = typename T::Vec;
  using Element = typename T::Element;
  static constexpr int kPixels = (K + S - 1) / S;  // that see one column

 public:
  static constexpr int kVectors = kPixels * V;

  explicit SF_INLINE_MEMBER ColumnWalk(const RowPass<T>& pass) : a_(pass) {}

  // One part of the output channels, `channel` being its first in the pass.
  SF_INLINE_MEMBER void run(const char* weights, int64_t channel) {
    const Acc* from = a_.from + channel;
    Acc* to = a_.to + channel;
    Vec bias[V];
    load_all(a_.bias + channel, bias);
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums_[i][v] = Vec{};
    }
    const int64_t columns = (a_.pixels - 1) * S + K;
    for (int64_t j = 0; j < columns; j += S) {
#pragma GCC unroll 8
      for (int i = kPixels - 1; i > 0; i--) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums_[i][v] = sums_[i - 1][v];
      }
      const int64_t pixel = j / S;
      if (pixel < a_.pixels) load_all(from + pixel * a_.from_step, sums_[0]);
      add_phases<0>(weights, j, pixel);
      const int64_t done = pixel - (kPixels - 1);
      if (done < 0) continue;
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) store(to + done * a_.to_step + v * kLanes<T>, sums_[kPixels - 1][v] + bias[v]);
    }
  }

 private:
  SF_INLINE void load_all(const Acc* p, Vec (&to)[V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) to[v] = load<Vec>(p + v * kLanes<T>);
  }

  // Columns j + kPhase .. j + S - 1.
  template <int kPhase>
  SF_INLINE_MEMBER void add_phases(const char* weights, int64_t j, int64_t pixel) {
    constexpr int kTaps = (K - kPhase + S - 1) / S;
    const int64_t past = pixel - (a_.pixels - 1);  // pixels that there are not, behind the last one
    if constexpr (kGraded) {  // not worth the code: sums of pixels that there are not may be wrong
      if (past < kTaps) add_column<kPhase, 0, kTaps>(weights, j + kPhase);
    } else if (past > 0) {
      add_right<kPhase, kTaps, kTaps - 1>(weights, j, past);
    } else {
      add_left<kPhase, kTaps>(weights, j, pixel + 1);
    }
    if constexpr (kPhase + 1 < S && kPhase + 1 < K) add_phases<kPhase + 1>(weights, j, pixel);
  }

  // The first pixels of a row: `n` of them have begun.
  template <int kPhase, int kTaps>
  SF_INLINE_MEMBER void add_left(const char* weights, int64_t j, int64_t n) {
    if constexpr (kTaps > 1) {
      if (n < kTaps) return add_left<kPhase, kTaps - 1>(weights, j, n);
    }
    add_column<kPhase, 0, kTaps>(weights, j + kPhase);
  }

  // The last ones: `past` have no pixel any more.
  template <int kPhase, int kTaps, int kPast>
  SF_INLINE_MEMBER void add_right(const char* weights, int64_t j, int64_t past) {
    if constexpr (kPast > 0) {
      if (past < kPast) return add_right<kPhase, kTaps, kPast - 1>(weights, j, past);
      if (past == kPast) add_column<kPhase, kPast, kTaps>(weights, j + kPhase);
    }
  }

  // Events of column j, to pixels kFirst .. kEnd.
  template <int kPhase, int kFirst, int kEnd>
  SF_INLINE_MEMBER void add_column(const char* weights, int64_t j) {
    const uint32_t* const end = a_.entries + a_.starts[j + 1];
    const Acc* value = kGraded ? a_.values + a_.starts[j] : nullptr;
    const auto base = reinterpret_cast<uintptr_t>(weights) - j * a_.row_bytes;
    for (const uint32_t* e = a_.entries + a_.starts[j]; e < end; e++) {
      const uintptr_t rows = base + *e;
      const Vec factor = splat<T>(kGraded ? *value++ : 0);
#pragma GCC unroll 8
      for (int i = kFirst; i < kEnd; i++) {
        Vec weights[V];
        load_weights<T, V>(reinterpret_cast<const Element*>(rows + (kPhase + i * S) * a_.row_bytes), weights);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          sums_[i][v] = kGraded ? multiply_add(weights[v], factor, sums_[i][v]) : sums_[i][v] + weights[v];
        }
      }
    }
  }

  const RowPass<T> a_;  // a copy: stores through `to` cannot alias it
  Vec sums_[kPixels][V];
};

template <class T, int K, int S, int V, bool kGraded>
void accumulate_columns(const RowPass<T>& pass) {
  constexpr int64_t kPart = V * kLanes<T>;
  const int64_t block = pass.row_bytes / int64_t(sizeof(typename T::Element));
  ColumnWalk<T, K, S, V, kGraded> walk(pass);
  for (int64_t b = 0; b < pass.blocks; b++) {
    for (int64_t c = 0; c < block; c += kPart) {
      walk.run(pass.weights + b * pass.block_bytes + c * int64_t(sizeof(typename T::Element)), b * block + c);
    }
  }
}

// The widest part of a block's channels that fits the registers; null where not even the least does.
template <class T, int K, int S, int V = 64 / kLanes<T>>
AccumulateRow<T> widest_columns(int64_t block, bool graded) {
  constexpr int64_t kPart = V * kLanes<T>, kLeast = kInterleaved<T> ? 2 * kInterleave : 16;
  if constexpr (kPart % kLeast == 0 && ColumnWalk<T, K, S, V, false>::kVectors <= kMaxColumnVectors) {
    if (block % kPart == 0) return graded ? accumulate_columns<T, K, S, V, true> : accumulate_columns<T, K, S, V, false>;
  }
  if constexpr (kPart > kLeast) return widest_columns<T, K, S, V / 2>(block, graded);
  return nullptr;
}

// The walk by columns for rows of blocks of `block` channels, or null if there is none. Each takes long to compile: there
// is one for the kernels that networks are made of, in the types they are run in.
template <class T>
AccumulateRow<T> find_columns(const SfConv& p, int64_t block, bool graded) {
  const int64_t k = p.kernel[2], s = p.stride[2];
  if constexpr (std::is_same_v<T, Float32> || std::is_same_v<T, BFloat16>) {
    if (p.dilation[2] != 1) return nullptr;
    if (k == 3 && s == 1) return widest_columns<T, 3, 1>(block, graded);
    if (k == 3 && s == 2) return widest_columns<T, 3, 2>(block, graded);
    if (k == 5 && s == 1) return widest_columns<T, 5, 1>(block, graded);
  }
  return nullptr;
}

// ---- by windows --------------------------------------------------------------------------------------------------

constexpr int kMaxVectors = 8;  // accumulators a pass keeps in registers

template <class T, int V, int Q>
AccumulateRow<T> accumulate_blocks(bool graded) {
  return graded ? accumulate_row<T, V, Q, true> : accumulate_row<T, V, Q, false>;
}

template <class T, int V>
AccumulateRow<T> accumulate_blocks_of(int64_t blocks, bool graded) {
  if constexpr (V * 4 <= kMaxVectors) {
    if (blocks == 4) return accumulate_blocks<T, V, 4>(graded);
  }
  if constexpr (V * 2 <= kMaxVectors) {
    if (blocks == 2) return accumulate_blocks<T, V, 2>(graded);
  }
  return blocks == 1 ? accumulate_blocks<T, V, 1>(graded) : nullptr;
}

// The pass that takes `blocks` packed blocks of `block` (16, 32, 64, 128) channels, or null if there is none so wide.
template <class T>
AccumulateRow<T> find_accumulate(int64_t block, int64_t blocks, bool graded) {
  constexpr int V = 16 / kLanes<T>;
  if constexpr (!kInterleaved<T>) {
    if (block == 16) return accumulate_blocks_of<T, V>(blocks, graded);
  }
  if (block == 32) return accumulate_blocks_of<T, 2 * V>(blocks, graded);
  if (block == 128) return accumulate_blocks_of<T, 8 * V>(blocks, graded);
  return accumulate_blocks_of<T, 4 * V>(blocks, graded);
}

}  // namespace sparseflow::SF_NAMESPACE
