// Event-driven convolution: schedules list building (events.h) and accumulation (accumulate.h) over tiles and threads.
#pragma once

#include "abi.h"
#include "accumulate.h"
#include "arena.h"
#include "events.h"
#include "simd.h"
#include "store.h"

namespace sparseflow::SF_NAMESPACE {

// Lists of up to `rows` output rows: the working set of one tile.
template <class T>
struct TileLists {
  RowLists<T>* rows;

  void place(Arena& arena, const ConvShape& s, int64_t n, bool graded) {
    rows = arena.take<RowLists<T>>(n);
    auto* entries = arena.take<uint32_t>(n * s.list_capacity);
    auto* values = graded ? arena.take<typename T::Acc>(n * s.list_capacity) : nullptr;
    auto* starts = arena.take<uint32_t>(n * s.slabs * s.starts);
    entries_ = entries, values_ = values, starts_ = starts;
  }

  void link(const ConvShape& s, int64_t n) const {
    for (int64_t i = 0; i < n; i++) {
      rows[i] = {entries_ + i * s.list_capacity, values_ ? values_ + i * s.list_capacity : nullptr,
                 starts_ + i * s.slabs * s.starts, true};
    }
  }

 private:
  uint32_t* entries_;
  typename T::Acc* values_;
  uint32_t* starts_;
};

template <class T>
class Conv {
  using Element = typename T::Element;
  using Acc = typename T::Acc;

 public:
  Conv(const SfConv& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
       const void* bias, void* out, bool graded, int threads)
      : p_(p),
        s_(p),
        builder_(p_, s_, x, bits, row_counts),
        packed_(static_cast<const char*>(packed)),
        output_{static_cast<Element*>(out), p.out_channels, s_.out_plane, p.out_channels_last != 0},
        graded_(graded),
        threads_(threads) {
    tile_rows_ = even_tile_rows(max(1, p_.tile / s_.tile_columns));
    column_tiles_ = ceil_div(p_.out_size[2], s_.tile_columns);
    list_rows_ = p_.split_outputs ? min(s_.out_rows, max(tile_rows_, kSharedListEntries / s_.list_capacity))
                                  : tile_rows_;
    bias_source_ = bias;
  }

  int run() {
    Arena sizes(nullptr);
    place(sizes);
    void* memory = sf_workspace(sizes.used());
    if (memory == nullptr) return 1;
    Arena arena(memory);
    place(arena);
    pad_bias<T>(bias_source_, p_.groups, s_.outputs, s_.blocks * p_.block, bias_);
    __builtin_memset(zeros_, 0, p_.width * sizeof(Acc));
    for (int64_t i = 0; i < s_.tile_columns; i++) {
      const int64_t relative = i * p_.stride[2], j = relative / p_.dilation[2];
      windows_[i] = uint32_t(relative % p_.dilation[2] * s_.phase_columns + j);
      shifts_[i] = j * s_.kernel_rows * s_.channels * p_.block * int64_t(sizeof(Element));
    }
    if (p_.split_outputs) {
      run_split_outputs();
    } else {
      run_split_pixels();
    }
    return 0;
  }

 private:
  static constexpr int64_t kMinTilePixels = 96;  // a tile shares every weight it loads among its pixels
  static constexpr int64_t kSharedListEntries = int64_t{1} << 20;

  struct Thread {
    TileLists<T> lists;
    InputRow* inputs;
    Span* spans;
    Acc* scratch;
  };

  struct Columns {
    int64_t first, count;
  };

  void place(Arena& arena) {
    bias_ = arena.take<Acc>(p_.groups * s_.blocks * p_.block);
    zeros_ = arena.take<Acc>(p_.width);
    windows_ = arena.take<uint32_t>(s_.tile_columns);
    shifts_ = arena.take<int64_t>(s_.tile_columns);
    costs_ = arena.take<int64_t>(ceil_div(s_.out_rows, tile_rows_) + 1);
    per_thread_ = arena.take<Thread>(threads_);
    const bool measuring = reinterpret_cast<uintptr_t>(bias_) == 0;
    for (int t = 0; t < threads_; t++) {
      Thread thread;
      if (!p_.split_outputs) thread.lists.place(arena, s_, list_rows_, graded_);
      thread.inputs = arena.take<InputRow>(s_.kernel_rows);
      thread.spans = arena.take<Span>(s_.kernel_rows);
      thread.scratch = arena.take<Acc>(tile_rows_ * s_.tile_columns * p_.width);
      if (!measuring) per_thread_[t] = thread;
    }
    if (p_.split_outputs) shared_.place(arena, s_, list_rows_, graded_);
  }

  Columns columns_of(int64_t column_tile) const {
    const int64_t first = column_tile * s_.tile_columns;
    return {first, min(s_.tile_columns, p_.out_size[2] - first)};
  }

  // At most `rows` rows a tile, such that the tiles are alike and there is work for every thread, three times over if
  // possible. Threads that split the output channels need no more tiles than make up for a lack of channels.
  int64_t even_tile_rows(int64_t rows) const {
    if (threads_ == 1) return rows;
    const int64_t passes = p_.split_outputs ? ceil_div(s_.blocks, p_.width / p_.block) : 1;
    const int64_t useful = max(threads_, s_.out_rows * s_.tile_columns / kMinTilePixels);
    const int64_t wanted = min(s_.out_rows, min(useful, ceil_div(3 * threads_, passes)));
    const int64_t tiles = max(ceil_div(s_.out_rows, rows), wanted);
    const int64_t multiple = p_.split_outputs ? 1 : threads_;
    return max(1, ceil_div(s_.out_rows, ceil_div(tiles, multiple) * multiple));
  }

  // Cumulated cost of row tiles: what an output pixel costs even if silent, and what its events cost.
  void estimate_costs(int64_t row_tiles) const {
    constexpr int64_t kPixelCost = 4;  // in additions of a weight row
    costs_[0] = 0;
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const int64_t row0 = tile * tile_rows_, rows = min(tile_rows_, s_.out_rows - row0);
      int64_t cost = rows * p_.out_size[2] * kPixelCost;
      for (int64_t i = 0; i < rows; i++) cost += builder_.count_events(row0 + i) * p_.kernel[2];
      costs_[tile + 1] = costs_[tile] + cost;
    }
  }

  // First tile of a thread's share: neighbouring tiles of equal cost in total. Not handed out dynamically, because
  // a thread that keeps its part of the map from layer to layer finds it in its own cache, and because threads that
  // alternate in a plane fight over the cache lines at the seams.
  int64_t share_begin(int64_t thread, int64_t team, int64_t row_tiles) const {
    if (thread == team) return row_tiles * column_tiles_;
    int64_t tile = 0;
    while (costs_[tile + 1] * team <= costs_[row_tiles] * thread && tile < row_tiles - 1) tile++;
    const int64_t into = costs_[row_tiles] * thread - costs_[tile] * team;
    const int64_t cost = max(1, (costs_[tile + 1] - costs_[tile]) * team);
    return tile * column_tiles_ + (2 * into * column_tiles_ + cost) / (2 * cost);  // to the nearest
  }

  // Every tile is one thread's: it builds the lists and adds up all output channels.
  void run_split_pixels() {
    const int64_t row_tiles = ceil_div(s_.out_rows, tile_rows_);
    estimate_costs(row_tiles);
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const Thread& thread = per_thread_[thread_index()];
      thread.lists.link(s_, list_rows_);
      const int64_t end = share_begin(thread_index() + 1, team_size(), row_tiles);
      for (int64_t tile = share_begin(thread_index(), team_size(), row_tiles); tile < end; tile++) {
        const Columns columns = columns_of(tile % column_tiles_);
        const int64_t row0 = tile / column_tiles_ * tile_rows_, rows = min(tile_rows_, s_.out_rows - row0);
        for (int64_t g = 0; g < p_.groups; g++) {
          for (int64_t i = 0; i < rows; i++) {
            builder_.build(row0 + i, columns.first, g, thread.inputs, thread.spans, thread.lists.rows[i]);
          }
          for (int64_t b = 0, n; b < s_.blocks; b += n) {
            n = blocks_in_pass(b);
            add_blocks(thread.lists.rows, row0, rows, columns, g, b, n, thread.scratch);
          }
        }
      }
    }
  }

  // Small maps with large weights: lists are built together, then each thread keeps to its own weights.
  void run_split_outputs() {
    shared_.link(s_, list_rows_);
    const int64_t passes = ceil_div(s_.blocks, p_.width / p_.block);
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const Thread& thread = per_thread_[thread_index()];
      for (int64_t part = 0; part < ceil_div(s_.out_rows, list_rows_) * column_tiles_; part++) {
        const Columns columns = columns_of(part % column_tiles_);
        const int64_t row0 = part / column_tiles_ * list_rows_, rows = min(list_rows_, s_.out_rows - row0);
        const int64_t row_tiles = ceil_div(rows, tile_rows_);
        for (int64_t g = 0; g < p_.groups; g++) {
#pragma omp for schedule(static)
          for (int64_t i = 0; i < rows; i++) {
            builder_.build(row0 + i, columns.first, g, thread.inputs, thread.spans, shared_.rows[i]);
          }
#pragma omp for schedule(static)
          for (int64_t item = 0; item < passes * row_tiles; item++) {
            const int64_t tile0 = item % row_tiles * tile_rows_;
            const int64_t b0 = item / row_tiles * (p_.width / p_.block);
            const int64_t b1 = min(s_.blocks, b0 + p_.width / p_.block);
            for (int64_t b = b0, n; b < b1; b += n) {
              n = blocks_in_pass(b);
              add_blocks(shared_.rows + tile0, row0 + tile0, min(tile_rows_, rows - tile0), columns, g, b, n,
                         thread.scratch);
            }
          }
        }
      }
    }
  }

  // The widest pass that starts at block b: a power of two, at most `width` channels.
  int64_t blocks_in_pass(int64_t b) const {
    int64_t n = p_.width / p_.block;
    while (n > s_.blocks - b || find_accumulate<T>(p_.block, n, graded_) == nullptr) n /= 2;
    return n;
  }

  void add_blocks(const RowLists<T>* lists, int64_t row0, int64_t rows, Columns columns, int64_t group, int64_t block,
                  int64_t n, Acc* scratch) const {
    const int64_t width = n * p_.block;
    const int64_t channel = block * p_.block, valid = min(width, s_.outputs - channel);
    const int64_t out_channel = group * s_.outputs + channel;
    const Acc* bias = bias_ + group * s_.blocks * p_.block + channel;
    if (!output_.channels_last && all_empty(lists, rows)) {
      for_image_runs(row0, rows, columns, [&](int64_t, int64_t pixels, int64_t image, int64_t pixel) {
        fill_planar<T>(bias, pixels, valid, output_.at(image, out_channel, pixel), output_.plane);
      });
      return;
    }
    const bool direct = kWide<T> && output_.channels_last && valid == width;
    RowPass<T> pass;
    pass.block_bytes = s_.weight_rows * p_.block * int64_t(sizeof(Element));
    pass.weights = packed_ + (group * s_.blocks + block) * pass.block_bytes;
    pass.windows = windows_;
    pass.shifts = shifts_;
    pass.kernel_columns = p_.kernel[2];
    pass.pixels = columns.count;
    const AccumulateRow<T> accumulate = find_accumulate<T>(p_.block, n, graded_);
    for (int64_t slab = 0; slab < s_.slabs; slab++) {
      for (int64_t i = 0; i < rows; i++) {
        Acc* tile_row = scratch + i * columns.count * width;
        pass.entries = lists[i].entries;
        pass.values = lists[i].values;
        pass.starts = lists[i].starts + slab * s_.starts;
        pass.from = slab == 0 ? zeros_ : tile_row;
        pass.from_step = slab == 0 ? 0 : width;
        pass.bias = slab == s_.slabs - 1 ? bias : zeros_;
        pass.to = tile_row;
        pass.to_step = width;
        if (direct && slab == s_.slabs - 1) {
          const int64_t row = row0 + i, per_image = p_.out_size[0] * p_.out_size[1];
          pass.to = reinterpret_cast<Acc*>(
              output_.at(row / per_image, out_channel, row % per_image * p_.out_size[2] + columns.first));
          pass.to_step = p_.out_channels;
        }
        accumulate(pass);
      }
    }
    if (direct) return;
    for_image_runs(row0, rows, columns, [&](int64_t first, int64_t pixels, int64_t image, int64_t pixel) {
      Element* to = output_.at(image, out_channel, pixel);
      if (output_.channels_last) {
        store_channels_last<T>(scratch + first * width, width, pixels, valid, to, output_.channels);
      } else {
        store_planar<T>(scratch + first * width, width, pixels, valid, to, output_.plane);
      }
    });
  }

  static bool all_empty(const RowLists<T>* lists, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      if (!lists[i].empty) return false;
    }
    return true;
  }

  // Calls visit(first pixel in the tile, pixels, image, first pixel in the image) for each image the rows belong to.
  // A tile of several rows always spans all columns, so its rows are contiguous within an image.
  template <class Visit>
  void for_image_runs(int64_t row0, int64_t rows, Columns columns, Visit visit) const {
    const int64_t per_image = p_.out_size[0] * p_.out_size[1];
    for (int64_t i = 0, n; i < rows; i += n) {
      const int64_t row = row0 + i;
      n = min(rows - i, per_image - row % per_image);
      visit(i * columns.count, n * columns.count, row / per_image,
            row % per_image * p_.out_size[2] + columns.first);
    }
  }

  const SfConv& p_;
  const ConvShape s_;
  const ListBuilder<T> builder_;
  const char* packed_;
  const OutputRun<T> output_;
  const bool graded_;
  const int threads_;
  int64_t tile_rows_, column_tiles_, list_rows_;
  const void* bias_source_;
  Acc* bias_;
  Acc* zeros_;
  uint32_t* windows_;
  int64_t* shifts_;
  int64_t* costs_;
  Thread* per_thread_;
  TileLists<T> shared_;
};

}  // namespace sparseflow::SF_NAMESPACE
