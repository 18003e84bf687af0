// Stage 2: walk each output pixel's list and add the weight rows into registers.
#pragma once

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
