// Convolution with weights of which whole blocks are zero: present blocks and events meet, everything else is skipped.
//
// A block is 16 output channels, one kernel tap and 16 input channels. Stage 1 writes, per tile of output pixels and per
// 16 input channels, one list of events; an entry names the event's place in the tile and its weight row within a block.
// Stage 2 takes one present block after the other and runs through the list of its input channels: each event adds its
// row of the block to the pixel that the tap leads to. The sums of a tile's 16 output channels stay in L1, the block
// does too, and neither an absent block nor a silent input is looked at. A list serves every tap and output channel.
//
// An input pixel at column x = q * stride + phase meets tap k, whose offset k * dilation - padding is
// shift * stride + phase, in output column q - shift; other phases never meet this tap. Rows are alike. Columns outside
// of the output fall into a gap behind each row of the sums, where nobody reads them.
#pragma once

#include "abi.h"
#include "arena.h"
#include "conv.h"
#include "events.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

constexpr int64_t kBlock = 16;  // output and input channels of a block

// Which blocks there are: [place of every block or -1][first of every 16 outputs, and an end][input block << 16 | tap].
struct BlockIndex {
  const int32_t* starts;
  const int32_t* keys;

  BlockIndex(const int32_t* index, int64_t output_blocks, int64_t input_blocks, int64_t taps)
      : starts(index + output_blocks * input_blocks * taps), keys(starts + output_blocks + 1) {}
};

// How an entry is written: the place in the tile's sums, in bytes, above the place of the weight row, in bytes.
template <class T>
struct Entry {
  static constexpr uint32_t kRowBytes = kBlock * sizeof(typename T::Element);
  static constexpr uint32_t kPixelBytes = kBlock * sizeof(typename T::Acc);
  static constexpr int kRowBits = sizeof(typename T::Element) == 8 ? 11 : sizeof(typename T::Element) == 4 ? 10 : 9;
  static constexpr uint32_t kRowMask = (1u << kRowBits) - 1;
  static_assert(kRowMask + 1 == kBlock * kRowBytes, "a row's place fills the low bits");
};

// Appends an entry for each of 16 bits; may write up to 16 entries past the end it returns.
template <class T>
SF_INLINE uint32_t* append_block_events(uint32_t bits, uint32_t base, uint32_t* out) {
#if defined(SF_AVX512)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)Entry<T>::kRowBytes));
  const __m512i entries = _mm512_add_epi32(rows, _mm512_set1_epi32((int)base));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)bits, entries));
  return out + popcount(bits);
#else
  for (; bits != 0; bits &= bits - 1) *out++ = base + Entry<T>::kRowBytes * uint32_t(lowest_bit(bits));
  return out;
#endif
}

// Adds the weight rows of a run of events to the sums that they lead to.
template <class T, bool kGraded>
SF_INLINE void scatter(const uint32_t* entry, const uint32_t* end, const typename T::Acc* value, const char* block,
                       uintptr_t sums) {
  constexpr int V = kBlock / kLanes<T>;
#pragma GCC unroll 4
  for (; entry < end; entry++) {
    auto* to = reinterpret_cast<typename T::Acc*>(sums + (*entry >> Entry<T>::kRowBits));
    const auto* row = reinterpret_cast<const typename T::Element*>(block + (*entry & Entry<T>::kRowMask));
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const typename T::Vec sum = load<typename T::Vec>(to + v * kLanes<T>), weight = T::widen(row + v * kLanes<T>);
      store(to + v * kLanes<T>, kGraded ? multiply_add(weight, splat<T>(*value), sum) : sum + weight);
    }
    if (kGraded) value++;
  }
}

// The taps of one axis: where each leads, and how far they reach.
struct TapAxis {
  int64_t stride, dilation, padding, taps;
  int64_t least, most;  // shifts of the first and the last tap

  TapAxis(const SfConv& p, int axis)
      : stride(p.stride[axis]), dilation(p.dilation[axis]), padding(p.padding[axis]), taps(p.kernel[axis]) {
    least = shift(0), most = shift(taps - 1);
  }

  int64_t offset(int64_t tap) const { return tap * dilation - padding; }
  int64_t phase(int64_t tap) const { return (offset(tap) % stride + stride) % stride; }
  int64_t shift(int64_t tap) const { return (offset(tap) - phase(tap)) / stride; }
  int64_t reach() const { return most - least; }
};

template <class T, class Sink>
class BlockConv {
  using Acc = typename T::Acc;
  using Input = typename Sink::Input;
  using E = Entry<T>;

 public:
  BlockConv(const SfConv& p, const Input* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
            const int32_t* index, const void* bias, const Sink& sink, bool graded, int threads)
      : p_(p),
        x_(x),
        bits_(bits),
        row_counts_(row_counts),
        packed_(static_cast<const char*>(packed)),
        bias_source_(bias),
        sink_(sink),
        graded_(graded),
        threads_(threads),
        rows_axis_(p, 1),
        columns_axis_(p, 2),
        pointwise_(is_pointwise(p)),
        taps_(p.kernel[0] * p.kernel[1] * p.kernel[2]),
        words_(ceil_div(p.in_channels, 64)),
        input_blocks_(ceil_div(p.in_channels, kBlock)),
        output_blocks_(ceil_div(p.out_channels, kBlock)),
        rows_(p.batch * p.out_size[0] * p.out_size[1] / sink.steps()),
        index_(index, output_blocks_, input_blocks_, taps_) {
    columns_ = min(p.out_size[2], max(1, p.tile));
    column_tiles_ = ceil_div(p.out_size[2], columns_);
    tile_rows_ = min(rows_, max(1, p.tile / columns_));
    if (threads > 1) tile_rows_ = ceil_div(rows_, max(ceil_div(rows_, tile_rows_), min(rows_, threads)));
    tile_rows_ = ceil_div(tile_rows_, sink.row_multiple()) * sink.row_multiple();
    tiles_ = ceil_div(rows_, tile_rows_) * column_tiles_;
    parts_ = tiles_ < 3 * threads ? min(output_blocks_, threads) : 1;
    gap_ = pointwise_ ? 0 : columns_axis_.reach();
    pitch_ = columns_ + gap_;
    groups_ = pointwise_ ? 1 : ceil_div(tile_rows_, p.out_size[1]) + 1;
    group_rows_ = rows_axis_.stride * (tile_rows_ + groups_ * rows_axis_.reach());
    starts_ = columns_axis_.stride * input_blocks_ * (group_rows_ + groups_);
  }

  int run() {
    Arena sizes(nullptr);
    place(sizes);
    void* memory = sf_workspace(sizes.used());
    if (memory == nullptr) return 1;
    Arena arena(memory);
    place(arena);
    pad_bias<T>(bias_source_, 1, p_.out_channels, output_blocks_ * kBlock, bias_);
    for (int64_t tap = 0; tap < taps_; tap++) place_tap(tap);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t item = 0; item < parts_ * tiles_; item++) {
      const int64_t part = item / tiles_, tile = item % tiles_;
      Tile at = tile_at(tile);
      for (at.t = 0; at.t < sink_.steps(); at.t++) {
        add_tile(at, part * output_blocks_ / parts_, (part + 1) * output_blocks_ / parts_, per_thread_[thread_index()]);
      }
    }
    return 0;
  }

 private:
  // Rows row0 .. row0 + rows of time step t (counted within the step), columns column .. column + columns.
  struct Tile {
    int64_t t, row0, rows, column, columns;
  };

  // Tile rows first .. first + rows, of one image and depth, and the lists of the input plane at one kernel depth.
  struct Group {
    int64_t first, rows;
    const uint32_t* starts;  // [phase][input block][phase of rows][row] and an end each; null outside of the input
    int64_t list_rows;       // rows of one phase
  };

  struct Thread {
    Group* groups;
    uint32_t* entries;
    Acc* values;
    uint32_t* starts;
    Acc* sums;
    Acc* finished;
  };

  // What a tap has in common for all blocks.
  struct Tap {
    int64_t depth, phase, row_phase, row;  // row: first row of a group's list that it reads
    uintptr_t back;                        // bytes from an entry's place back to the sums
  };

  static bool is_pointwise(const SfConv& p) {
    for (int i = 0; i < 3; i++) {
      if (p.kernel[i] != 1 || p.stride[i] != 1 || p.padding[i] != 0 || p.in_size[i] != p.out_size[i]) return false;
    }
    return true;
  }

  void place(Arena& arena) {
    const int64_t columns_in = columns_axis_.stride * (columns_ + columns_axis_.reach());
    const int64_t pixels = pointwise_ ? tile_rows_ * columns_ : p_.kernel[0] * group_rows_ * columns_in;
    const int64_t capacity = pixels * input_blocks_ * kBlock + kListSlack;
    bias_ = arena.take<Acc>(output_blocks_ * kBlock);
    tap_ = arena.take<Tap>(taps_);
    per_thread_ = arena.take<Thread>(threads_);
    const bool measuring = reinterpret_cast<uintptr_t>(bias_) == 0;
    for (int i = 0; i < threads_; i++) {
      Thread thread;
      thread.groups = arena.take<Group>(groups_ * p_.kernel[0]);
      thread.entries = arena.take<uint32_t>(capacity);
      thread.values = graded_ ? arena.take<Acc>(capacity) : nullptr;
      thread.starts = arena.take<uint32_t>(p_.kernel[0] * starts_);
      thread.sums = arena.take<Acc>((tile_rows_ * pitch_ + 2 * gap_) * kBlock);
      thread.finished = arena.take<Acc>(tile_rows_ * columns_ * kBlock);
      if (!measuring) per_thread_[i] = thread;
    }
  }

  void place_tap(int64_t tap) const {
    const int64_t column = tap % p_.kernel[2], row = tap / p_.kernel[2] % p_.kernel[1];
    const int64_t first = pointwise_ ? 0 : rows_axis_.shift(row) - rows_axis_.least;
    const int64_t over = pointwise_ ? 0 : columns_axis_.shift(column) - columns_axis_.least;
    tap_[tap] = {tap / p_.kernel[2] / p_.kernel[1], columns_axis_.phase(column), rows_axis_.phase(row), first,
                 uintptr_t(first * pitch_ + over) * E::kPixelBytes};
  }

  Tile tile_at(int64_t tile) const {
    const int64_t row0 = tile / column_tiles_ * tile_rows_, column = tile % column_tiles_ * columns_;
    return {0, row0, min(tile_rows_, rows_ - row0), column, min(columns_, p_.out_size[2] - column)};
  }

  void add_tile(const Tile& tile, int64_t first, int64_t end, const Thread& thread) const {
    const int64_t groups = pointwise_ ? list_pixels(tile, thread) : list_groups(tile, thread);
    for (int64_t b = first; b < end; b++) {
      __builtin_memset(thread.sums, 0, (tile_rows_ * pitch_ + 2 * gap_) * kBlock * sizeof(Acc));
      if (graded_) {
        add_blocks<true>(b, groups, thread);
      } else {
        add_blocks<false>(b, groups, thread);
      }
      finish(tile, b, thread);
    }
  }

  // All present blocks of output block b.
  template <bool kGraded>
  void add_blocks(int64_t b, int64_t groups, const Thread& thread) const {
    constexpr int64_t kBlockBytes = kBlock * E::kRowBytes;
    const uintptr_t sums = reinterpret_cast<uintptr_t>(thread.sums + gap_ * kBlock);
    for (int32_t i = index_.starts[b]; i < index_.starts[b + 1]; i++) {
      const Tap& tap = tap_[index_.keys[i] & 0xffff];
      const int64_t list = tap.phase * input_blocks_ + (uint32_t(index_.keys[i]) >> 16);
      const char* block = packed_ + i * kBlockBytes;
      for (int64_t g = 0; g < groups; g++) {
        const Group& group = thread.groups[g * p_.kernel[0] + tap.depth];
        if (group.starts == nullptr) continue;
        const uint32_t* starts = group.starts + list * (rows_axis_.stride * group.list_rows + 1) +
                                 tap.row_phase * group.list_rows + tap.row;
        const uint32_t begin = starts[0], end = starts[group.rows];
        scatter<T, kGraded>(thread.entries + begin, thread.entries + end, kGraded ? thread.values + begin : nullptr,
                            block, sums + group.first * pitch_ * E::kPixelBytes - tap.back);
      }
    }
  }

  // Adds the bias, drops the gaps and hands the sums over.
  void finish(const Tile& tile, int64_t b, const Thread& thread) const {
    constexpr int V = kBlock / kLanes<T>;
    const int64_t channel = b * kBlock, valid = min(kBlock, p_.out_channels - channel);
    typename T::Vec bias[V];
    for (int v = 0; v < V; v++) bias[v] = load<typename T::Vec>(bias_ + channel + v * kLanes<T>);
    bool stored = false;
    for (int64_t i = 0; i < tile.rows; i++) {
      const Acc* from = thread.sums + (gap_ + i * pitch_) * kBlock;
      Acc* to = thread.finished + i * tile.columns * kBlock;
      int64_t step = kBlock;
      if constexpr (std::is_same_v<Sink, DenseSink<T>>) {
        if (Acc* at = sink_.direct(tile.row0 + i, tile.column, channel, valid == kBlock)) {
          to = at, step = p_.out_channels, stored = true;
        }
      }
      for (int64_t p = 0; p < tile.columns; p++, from += kBlock, to += step) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          store(to + v * kLanes<T>, load<typename T::Vec>(from + v * kLanes<T>) + bias[v]);
        }
      }
    }
    if (stored) return;
    sink_.store(thread.finished, kBlock, tile.t, 1, tile.row0, tile.rows, tile.column, tile.columns, channel, valid);
  }

  // ---- lists ------------------------------------------------------------------------------------------------------

  // Where a list is being written.
  struct Cursor {
    uint32_t* entry;
    Acc* value;  // null for binary input
  };

  // Input pixels are output pixels: one row of all pixels of the tile.
  int64_t list_pixels(const Tile& tile, const Thread& thread) const {
    Cursor at{thread.entries, thread.values};
    uint32_t* starts = thread.starts;
    const int64_t row = tile.t * rows_ + tile.row0;
    for (int64_t b = 0; b < input_blocks_; b++) {
      *starts++ = uint32_t(at.entry - thread.entries);
      for (int64_t i = 0; i < tile.rows; i++) {
        if (row_counts_[row + i] != 0) append_run(row + i, tile.column, tile.columns, b, i * pitch_, at);
      }
      *starts++ = uint32_t(at.entry - thread.entries);
    }
    thread.groups[0] = {0, 1, thread.starts, 1};
    return 1;
  }

  // The tile's rows by image and depth, and of each the lists at every kernel depth.
  int64_t list_groups(const Tile& tile, const Thread& thread) const {
    Cursor at{thread.entries, thread.values};
    uint32_t* starts = thread.starts;
    int64_t groups = 0;
    for (int64_t first = 0, n; first < tile.rows; first += n, groups++) {
      const int64_t row = tile.t * rows_ + tile.row0 + first, top = row % p_.out_size[1];
      const int64_t plane = row / p_.out_size[1], image = plane / p_.out_size[0], depth = plane % p_.out_size[0];
      n = min(tile.rows - first, p_.out_size[1] - top);
      for (int64_t k = 0; k < p_.kernel[0]; k++) {
        const int64_t d = depth * p_.stride[0] - p_.padding[0] + k * p_.dilation[0];
        Group& group = thread.groups[groups * p_.kernel[0] + k];
        group = {first, n, nullptr, n + rows_axis_.reach()};
        if (d < 0 || d >= p_.in_size[0]) continue;
        group.starts = starts;
        starts = list_plane(tile, (image * p_.in_size[0] + d) * p_.in_size[1], top, group, thread, at, starts);
      }
    }
    return groups;
  }

  // Lists of an input plane, whose first row of pixels is plane_row, for output rows from `top` on.
  uint32_t* list_plane(const Tile& tile, int64_t plane_row, int64_t top, const Group& group, const Thread& thread,
                       Cursor& at, uint32_t* starts) const {
    const int64_t sy = rows_axis_.stride, q0 = top + rows_axis_.least;
    for (int64_t phase = 0; phase < columns_axis_.stride; phase++) {
      for (int64_t b = 0; b < input_blocks_; b++) {
        for (int64_t i = 0; i < sy * group.list_rows; i++) {
          *starts++ = uint32_t(at.entry - thread.entries);
          const int64_t r = i % group.list_rows, y = (q0 + r) * sy + i / group.list_rows;
          if (y < 0 || y >= p_.in_size[1] || row_counts_[plane_row + y] == 0) continue;
          append_columns(plane_row + y, phase, tile, b, r * pitch_, at);
        }
        *starts++ = uint32_t(at.entry - thread.entries);
      }
    }
    return starts;
  }

  // Columns of one phase that a tile reads from an input row.
  void append_columns(int64_t row, int64_t phase, const Tile& tile, int64_t b, int64_t place, Cursor& at) const {
    const int64_t s = columns_axis_.stride, q0 = tile.column + columns_axis_.least;
    const int64_t begin = max(q0, 0), end = min(q0 + tile.columns + columns_axis_.reach(), ceil_div(p_.in_size[2] - phase, s));
    if (begin < end) append_run(row, begin * s + phase, end - begin, b, place + begin - q0, at);
  }

  // `count` pixels of an input row, a stride apart, the first one at `place` of the tile.
  void append_run(int64_t row, int64_t column, int64_t count, int64_t b, int64_t place, Cursor& at) const {
    const int64_t pixel = row * p_.in_size[2] + column, s = columns_axis_.stride;
    const uint64_t* word = bits_ + pixel * words_ + b / 4;
    const int shift = int(b % 4 * kBlock);
    uint32_t base = uint32_t(place * E::kPixelBytes) << E::kRowBits;
    for (int64_t i = 0; i < count; i++, word += s * words_, base += E::kPixelBytes << E::kRowBits) {
      const auto bits = uint32_t(*word >> shift & 0xffff);
      if (at.value != nullptr) at.value = append_graded(bits, pixel + i * s, b, at.value);
      at.entry = append_block_events<T>(bits, base, at.entry);
    }
  }

  Acc* append_graded(uint32_t bits, int64_t pixel, int64_t b, Acc* value) const {
    const int64_t plane = p_.in_size[0] * p_.in_size[1] * p_.in_size[2];
    if (p_.x_channels_last) return append_values<T, Input>(bits, x_ + pixel * p_.in_channels + b * kBlock, 1, value);
    const int64_t image = pixel / plane;
    const Input* x = x_ + (image * p_.in_channels + b * kBlock) * plane + pixel % plane;
    return append_values<T, Input>(bits, x, plane, value);
  }

  const SfConv& p_;
  const Input* x_;
  const uint64_t* bits_;
  const uint32_t* row_counts_;
  const char* packed_;
  const void* bias_source_;
  const Sink& sink_;
  const bool graded_;
  const int threads_;
  const TapAxis rows_axis_, columns_axis_;
  const bool pointwise_;
  const int64_t taps_, words_, input_blocks_, output_blocks_;
  const int64_t rows_;  // output rows of one time step
  const BlockIndex index_;
  int64_t columns_, column_tiles_, tile_rows_, tiles_, parts_, gap_, pitch_;
  int64_t groups_, group_rows_;  // at most, of one tile: groups, and rows of their lists
  int64_t starts_;
  Acc* bias_;
  Tap* tap_;
  Thread* per_thread_;
};

}  // namespace sparseflow::SF_NAMESPACE
