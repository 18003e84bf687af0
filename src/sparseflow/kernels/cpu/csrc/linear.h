// Event-driven linear layer for few rows: the weight rows of the active inputs are streamed once, eight at a time, into
// sums that stay in L1. Memory bandwidth is the limit, so rows are long and contiguous and the next ones prefetched.
#pragma once

#include "abi.h"
#include "arena.h"
#include "events.h"
#include "simd.h"
#include "store.h"

namespace sparseflow::SF_NAMESPACE {

// `Input` is what graded spikes are read as: the layer's own elements, or counts.
template <class T, class Input = typename T::Element>
class Linear {
  using Element = typename T::Element;
  using Acc = typename T::Acc;
  using Vec = typename T::Vec;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kMaxColumns = 2048;  // sums of one row that stay in L1
  static constexpr int64_t kStep = kInterleaved<T> ? 2 * kInterleave : L;  // channels at a time
  static constexpr int kVectors = kStep / L;

 public:
  Linear(const SfLinear& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
         const void* bias, bool graded, int threads)
      : p_(p),
        x_(static_cast<const Input*>(x)),
        bits_(bits),
        row_counts_(row_counts),
        packed_(static_cast<const char*>(packed)),
        bias_source_(bias),
        graded_(graded),
        threads_(threads),
        words_(ceil_div(p.in_features, 64)),
        slabs_(ceil_div(words_, p.slab)),
        blocks_(ceil_div(p.out_features, p.block)),
        row_bytes_(p.block * int64_t(sizeof(Element))) {
    // As long as the threads allow: memory likes long rows.
    const int64_t share = ceil_div(blocks_ * p.block, threads);
    item_columns_ = min(min(p.block, kMaxColumns), ceil_div(share, 64) * 64);
    block_items_ = ceil_div(p.block, item_columns_);
    events_ = 0;
    for (int64_t r = 0; r < p_.rows; r++) events_ += row_counts_[r];
  }

  // Of workspace, that run() takes.
  int64_t bytes() {
    Arena sizes(nullptr);
    place(sizes);
    return sizes.used();
  }

  int run(void* out) {
    void* memory = sf_workspace(bytes());
    if (memory == nullptr) return 1;
    out_ = static_cast<Element*>(out);
    Arena arena(memory);
    place(arena);
    pad_bias<T>(bias_source_, 1, p_.out_features, blocks_ * p_.block, bias_);
    int64_t at = 0;
    for (int64_t r = 0; r < p_.rows; r++) at = append_row(r, at);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t i = 0; i < blocks_ * block_items_; i++) {
      add_item(item(i), sums_ + thread_index() * p_.rows * item_columns_);
    }
    return 0;
  }

 private:
  void place(Arena& arena) {
    bias_ = arena.take<Acc>(blocks_ * p_.block);
    entries_ = arena.take<uint32_t>(events_ + kListSlack);
    values_ = graded_ ? arena.take<Acc>(events_ + kListSlack) : nullptr;
    starts_ = arena.take<uint32_t>(p_.rows * (slabs_ + 1));
    sums_ = arena.take<Acc>(threads_ * p_.rows * item_columns_);
  }

  int64_t append_row(int64_t r, int64_t at) const {
    const EventWriter writer{uint32_t(row_bytes_)};
    uint32_t* starts = starts_ + r * (slabs_ + 1);
    uint32_t* entry = entries_ + at;
    Acc* value = graded_ ? values_ + at : nullptr;
    for (int64_t w = 0; w < words_; w++) {
      if (w % p_.slab == 0) *starts++ = uint32_t(entry - entries_);
      const uint64_t bits = bits_[r * words_ + w];
      if (graded_) value = append_values<T, Input>(bits, x_ + r * p_.in_features + 64 * w, 1, value);
      entry = writer.append(bits, uint32_t(64 * w * row_bytes_), entry);
    }
    *starts = uint32_t(entry - entries_);
    return entry - entries_;
  }

  // Some columns of one packed block.
  struct Item {
    const char* weights;
    int64_t channel;  // first output channel
    int64_t columns;
  };

  Item item(int64_t index) const {
    const int64_t block = index / block_items_, column = index % block_items_ * item_columns_;
    const char* weights = packed_ + block * p_.in_features * row_bytes_ + column * int64_t(sizeof(Element));
    return {weights, block * p_.block + column, min(item_columns_, p_.block - column)};
  }

  void add_item(const Item& item, Acc* sums) const {
    __builtin_memset(sums, 0, p_.rows * item.columns * sizeof(Acc));
    for (int64_t slab = 0; slab < slabs_; slab++) {
      for (int64_t r = 0; r < p_.rows; r++) {
        const uint32_t* starts = starts_ + r * (slabs_ + 1) + slab;
        if (graded_) {
          add_rows<true>(item, starts[0], starts[1], sums + r * item.columns);
        } else {
          add_rows<false>(item, starts[0], starts[1], sums + r * item.columns);
        }
      }
    }
    const int64_t valid = min(item.columns, p_.out_features - item.channel);
    if (valid <= 0) return;
    for (int64_t r = 0; r < p_.rows; r++) {
      for (int64_t c = 0; c < item.columns; c++) sums[r * item.columns + c] += bias_[item.channel + c];
    }
    store_channels_last<T>(sums, item.columns, p_.rows, valid, out_ + item.channel, p_.out_features);
  }

  // Adds the weight rows of entries first .. last - 1, eight together, then what is left.
  template <bool kGraded>
  void add_rows(const Item& item, uint32_t first, uint32_t last, Acc* sums) const {
    uint32_t i = first;
    for (; i + 8 <= last; i += 8) add_group<kGraded, 8>(item, i, last, sums);
    if (i + 4 <= last) add_group<kGraded, 4>(item, i, last, sums), i += 4;
    if (i + 2 <= last) add_group<kGraded, 2>(item, i, last, sums), i += 2;
    if (i < last) add_group<kGraded, 1>(item, i, last, sums);
  }

  template <bool kGraded, int N>
  void add_group(const Item& item, uint32_t i, uint32_t last, Acc* sums) const {
    const Element* rows[N];
    const Element* next[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; k++) {
      rows[k] = reinterpret_cast<const Element*>(item.weights + entries_[i + k]);
      next[k] = reinterpret_cast<const Element*>(item.weights + entries_[min(i + N + k, last - 1)]);
    }
    for (int64_t c = 0; c < item.columns; c += kStep) {
      Vec terms[N][kVectors];
#pragma GCC unroll 8
      for (int k = 0; k < N; k++) {
        load_weights<T, kVectors>(rows[k] + c, terms[k]);
        __builtin_prefetch(next[k] + c, 0, 2);  // to L2: eight long rows are more than L1 holds
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) {
        if constexpr (kGraded) {
#pragma GCC unroll 8
          for (int k = 0; k < N; k++) terms[k][v] *= splat<T>(values_[i + k]);
        }
#pragma GCC unroll 4
        for (int half = N / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
          for (int k = 0; k < half; k++) terms[k][v] += terms[k + half][v];
        }
        store(sums + c + v * L, load<Vec>(sums + c + v * L) + terms[0][v]);
      }
    }
  }

  const SfLinear& p_;
  const Input* x_;
  const uint64_t* bits_;
  const uint32_t* row_counts_;
  const char* packed_;
  const void* bias_source_;
  const bool graded_;
  const int threads_;
  const int64_t words_, slabs_, blocks_, row_bytes_;
  int64_t events_, item_columns_, block_items_;
  Element* out_ = nullptr;
  Acc* bias_;
  uint32_t* entries_;
  Acc* values_;
  uint32_t* starts_;
  Acc* sums_;
};

}  // namespace sparseflow::SF_NAMESPACE
