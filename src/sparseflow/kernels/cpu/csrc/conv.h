// Event-driven convolution: schedules list building (events.h) and accumulation (accumulate.h) over tiles and threads.
//
// Images are [steps][N]. A tile is a range of output rows of one time step, taken at several steps: what receives the
// sums, the sink, sees the steps of every pixel in order, so that a neuron can run on them while they are in cache.
#pragma once

#include <type_traits>

#include "abi.h"
#include "accumulate.h"
#include "arena.h"
#include "events.h"
#include "shares.h"
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

// Sums go to a dense tensor, whose images are independent: one time step.
template <class T>
class DenseSink {
  using Element = typename T::Element;
  using Acc = typename T::Acc;

 public:
  using Input = Element;

  DenseSink(const SfConv& p, void* out)
      : out_size_{p.out_size[0], p.out_size[1], p.out_size[2]},
        output_{static_cast<Element*>(out), p.out_channels, p.out_size[0] * p.out_size[1] * p.out_size[2],
                p.out_channels_last != 0} {}

  int64_t steps() const { return 1; }

  int64_t row_multiple() const { return 1; }

  // Where the sums of a row may be written at once, `out_channels` apart; null where they need rounding or transposing.
  Acc* direct(int64_t row, int64_t column, int64_t channel, bool whole) const {
    if (!kWide<T> || !output_.channels_last || !whole) return nullptr;
    const int64_t per_image = out_size_[0] * out_size_[1];
    return reinterpret_cast<Acc*>(
        output_.at(row / per_image, channel, row % per_image * out_size_[2] + column));
  }

  // Takes care of silent rows, whose sums are the bias; false if they have to be stored like others.
  bool store_silent(const Acc* bias, int64_t row0, int64_t rows, int64_t column, int64_t columns, int64_t channel,
                    int64_t valid) const {
    if (output_.channels_last) return false;
    for_image_runs(row0, rows, column, columns, [&](int64_t, int64_t pixels, int64_t image, int64_t pixel) {
      fill_planar<T>(bias, pixels, valid, output_.at(image, channel, pixel), output_.plane);
    });
    return true;
  }

  void store(Acc* sums, int64_t width, int64_t, int64_t, int64_t row0, int64_t rows, int64_t column, int64_t columns,
             int64_t channel, int64_t valid) const {
    for_image_runs(row0, rows, column, columns, [&](int64_t first, int64_t pixels, int64_t image, int64_t pixel) {
      Element* to = output_.at(image, channel, pixel);
      if (output_.channels_last) {
        store_channels_last<T>(sums + first * width, width, pixels, valid, to, output_.channels);
      } else {
        store_planar<T>(sums + first * width, width, pixels, valid, to, output_.plane);
      }
    });
  }

 private:
  // Calls visit(first pixel in the tile, pixels, image, first pixel in the image) for each image the rows belong to.
  // A tile of several rows always spans all columns, so its rows are contiguous within an image.
  template <class Visit>
  void for_image_runs(int64_t row0, int64_t rows, int64_t column, int64_t columns, Visit visit) const {
    const int64_t per_image = out_size_[0] * out_size_[1];
    for (int64_t i = 0, n; i < rows; i += n) {
      const int64_t row = row0 + i;
      n = min(rows - i, per_image - row % per_image);
      visit(i * columns, n * columns, row / per_image, row % per_image * out_size_[2] + column);
    }
  }

  const int64_t out_size_[3];
  const OutputRun<T> output_;
};

template <class T, class Sink>
class Conv {
  using Element = typename T::Element;
  using Acc = typename T::Acc;
  using Input = typename Sink::Input;

 public:
  Conv(const SfConv& p, const Input* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
       const void* bias, const Sink& sink, bool graded, int threads)
      : p_(p),
        s_(p),
        builder_(p_, s_, x, bits, row_counts),
        packed_(static_cast<const char*>(packed)),
        sink_(sink),
        graded_(graded),
        threads_(threads),
        rows_(s_.out_rows / sink.steps()) {
    const int64_t tile_rows = max(1, p_.tile / s_.tile_columns), multiple = sink_.row_multiple();  // over all steps
    steps_ = min(sink_.steps(), max(1, tile_rows / multiple));
    tile_rows_ = ceil_div(even_tile_rows(max(1, tile_rows / steps_)), multiple) * multiple;
    column_tiles_ = ceil_div(p_.out_size[2], s_.tile_columns);
    list_rows_ = p_.split_outputs
                     ? min(rows_, max(tile_rows_, kSharedListEntries / (s_.list_capacity * steps_) / multiple * multiple))
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
      shifts_[i] = j * p_.block * int64_t(sizeof(Element));
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

  // Steps t0 .. t0 + steps of rows row0 .. row0 + rows (counted within a step).
  struct Tile {
    int64_t t0, steps, row0, rows;
    Columns columns;
  };

  static constexpr bool kDense = std::is_same_v<Sink, DenseSink<T>>;

  void place(Arena& arena) {
    bias_ = arena.take<Acc>(p_.groups * s_.blocks * p_.block);
    zeros_ = arena.take<Acc>(p_.width);
    windows_ = arena.take<uint32_t>(s_.tile_columns);
    shifts_ = arena.take<int64_t>(s_.tile_columns);
    costs_ = arena.take<int64_t>(ceil_div(rows_, tile_rows_) + 1);
    per_thread_ = arena.take<Thread>(threads_);
    shares_.place(arena, threads_);
    const bool measuring = reinterpret_cast<uintptr_t>(bias_) == 0;
    for (int t = 0; t < threads_; t++) {
      Thread thread;
      if (!p_.split_outputs) thread.lists.place(arena, s_, list_rows_ * steps_, graded_);
      thread.inputs = arena.take<InputRow>(s_.kernel_rows);
      thread.spans = arena.take<Span>(s_.kernel_rows);
      thread.scratch = arena.take<Acc>(steps_ * tile_rows_ * s_.tile_columns * p_.width);
      if (!measuring) per_thread_[t] = thread;
    }
    if (p_.split_outputs) shared_.place(arena, s_, list_rows_ * steps_, graded_);
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
    const int64_t wanted = min(rows_, min(useful, ceil_div(3 * threads_, passes)));
    const int64_t tiles = max(ceil_div(rows_, rows), wanted);
    const int64_t multiple = p_.split_outputs ? 1 : threads_;
    return max(1, ceil_div(rows_, ceil_div(tiles, multiple) * multiple));
  }

  // Cumulated cost of row tiles: what an output pixel costs even if silent, and what its events cost.
  void estimate_costs(int64_t row_tiles) const {
    constexpr int64_t kPixelCost = 4;  // in additions of a weight row
    costs_[0] = 0;
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const int64_t row0 = tile * tile_rows_, rows = min(tile_rows_, rows_ - row0);
      int64_t cost = sink_.steps() * rows * p_.out_size[2] * kPixelCost;
      for (int64_t t = 0; t < sink_.steps(); t++) {
        for (int64_t i = 0; i < rows; i++) cost += builder_.count_events(t * rows_ + row0 + i) * p_.kernel[2];
      }
      costs_[tile + 1] = costs_[tile] + cost;
    }
  }

  // First tile of a thread's share: neighbouring tiles of equal cost in total. A thread that keeps its part of the map from
  // layer to layer finds it in its own cache, and threads that alternate in a plane fight over the cache lines at the
  // seams: only what is left at the end changes hands.
  int64_t share_begin(int64_t thread, int64_t row_tiles) const {
    if (thread == threads_) return row_tiles * column_tiles_;
    int64_t tile = 0;
    while (costs_[tile + 1] * threads_ <= costs_[row_tiles] * thread && tile < row_tiles - 1) tile++;
    const int64_t into = costs_[row_tiles] * thread - costs_[tile] * threads_;
    const int64_t cost = max(1, (costs_[tile + 1] - costs_[tile]) * threads_);
    return tile * column_tiles_ + (2 * into * column_tiles_ + cost) / (2 * cost);  // to the nearest
  }

  // Every tile is one thread's: it builds the lists and adds up all output channels.
  void run_split_pixels() {
    const int64_t row_tiles = ceil_div(rows_, tile_rows_);
    estimate_costs(row_tiles);
    for (int t = 0; t < threads_; t++) shares_.set(t, share_begin(t, row_tiles), share_begin(t + 1, row_tiles));
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const Thread& thread = per_thread_[thread_index()];
      thread.lists.link(s_, list_rows_ * steps_);
      for (int64_t i; (i = shares_.take(thread_index())) >= 0;) {
        const int64_t row0 = i / column_tiles_ * tile_rows_;
        Tile tile{0, 0, row0, min(tile_rows_, rows_ - row0), columns_of(i % column_tiles_)};
        for (int64_t g = 0; g < p_.groups; g++) {
          for (tile.t0 = 0; tile.t0 < sink_.steps(); tile.t0 += steps_) {
            tile.steps = min(steps_, sink_.steps() - tile.t0);
            for (int64_t j = 0; j < tile.steps * tile.rows; j++) {
              build(tile, j, g, thread, thread.lists.rows[j]);
            }
            add_all_blocks(thread.lists.rows, tile.rows, tile, g, 0, s_.blocks, thread.scratch);
          }
        }
      }
    }
  }

  // Small maps with large weights: lists are built together, then each thread keeps to its own weights.
  void run_split_outputs() {
    shared_.link(s_, list_rows_ * steps_);
    const int64_t pass_blocks = p_.width / p_.block, passes = ceil_div(s_.blocks, pass_blocks);
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const Thread& thread = per_thread_[thread_index()];
      for (int64_t part = 0; part < ceil_div(rows_, list_rows_) * column_tiles_; part++) {
        const int64_t row0 = part / column_tiles_ * list_rows_;
        Tile all{0, 0, row0, min(list_rows_, rows_ - row0), columns_of(part % column_tiles_)};
        const int64_t row_tiles = ceil_div(all.rows, tile_rows_);
        for (int64_t g = 0; g < p_.groups; g++) {
          for (all.t0 = 0; all.t0 < sink_.steps(); all.t0 += steps_) {
            all.steps = min(steps_, sink_.steps() - all.t0);
            for (int64_t t = thread_index(), n = passes * row_tiles; t < threads_; t += team_size()) {
              shares_.set(t, t * n / threads_, (t + 1) * n / threads_);
            }
#pragma omp for schedule(static)
            for (int64_t j = 0; j < all.steps * all.rows; j++) build(all, j, g, thread, shared_.rows[j]);
            for (int64_t item; (item = shares_.take(thread_index())) >= 0;) {
              const int64_t first = item % row_tiles * tile_rows_, b0 = item / row_tiles * pass_blocks;
              Tile tile = all;
              tile.row0 = all.row0 + first, tile.rows = min(tile_rows_, all.rows - first);
              add_all_blocks(shared_.rows + first, all.rows, tile, g, b0, min(s_.blocks, b0 + pass_blocks),
                             thread.scratch);
            }
#pragma omp barrier
          }
        }
      }
    }
  }

  // List j of a tile: one row at one step.
  void build(const Tile& tile, int64_t j, int64_t group, const Thread& thread, RowLists<T>& lists) const {
    const int64_t row = (tile.t0 + j / tile.rows) * rows_ + tile.row0 + j % tile.rows;
    builder_.build(row, tile.columns.first, group, thread.inputs, thread.spans, lists);
  }

  // Output blocks first..end of a tile, whose lists of one step lie `list_step` apart.
  void add_all_blocks(const RowLists<T>* lists, int64_t list_step, const Tile& tile, int64_t group, int64_t first,
                      int64_t end, Acc* scratch) const {
    for (int64_t b = first, n; b < end; b += n) {
      n = blocks_in_pass(b);
      add_blocks(lists, list_step, tile, group, b, n, scratch);
    }
  }

  // The widest pass that starts at block b: a power of two, at most `width` channels.
  int64_t blocks_in_pass(int64_t b) const {
    int64_t n = p_.width / p_.block;
    while (n > s_.blocks - b || find_accumulate<T>(p_.block, n, graded_) == nullptr) n /= 2;
    return n;
  }

  void add_blocks(const RowLists<T>* lists, int64_t list_step, const Tile& tile, int64_t group, int64_t block,
                  int64_t n, Acc* scratch) const {
    const int64_t width = n * p_.block;
    const int64_t channel = block * p_.block, valid = min(width, s_.outputs - channel);
    const int64_t out_channel = group * s_.outputs + channel;
    const Acc* bias = bias_ + group * s_.blocks * p_.block + channel;
    const auto [first_column, columns] = tile.columns;
    if constexpr (kDense) {
      const bool silent = all_empty(lists, tile.rows);
      if (silent && sink_.store_silent(bias, tile.row0, tile.rows, first_column, columns, out_channel, valid)) return;
    }
    RowPass<T> pass;
    pass.block_bytes = s_.weight_rows * p_.block * int64_t(sizeof(Element));
    pass.weights = packed_ + (group * s_.blocks + block) * pass.block_bytes;
    pass.windows = windows_;
    pass.shifts = shifts_;
    pass.kernel_columns = p_.kernel[2];
    pass.pixels = columns;
    pass.blocks = n;
    pass.row_bytes = p_.block * int64_t(sizeof(Element));
    const AccumulateRow<T> columns_walk = columns == 1 ? nullptr : find_columns<T>(p_, p_.block, graded_);
    const AccumulateRow<T> accumulate = columns_walk ? columns_walk : find_accumulate<T>(p_.block, n, graded_);
    bool stored = false;
    for (int64_t slab = 0; slab < s_.slabs; slab++) {
      const bool last = slab == s_.slabs - 1;
      for (int64_t j = 0; j < tile.steps * tile.rows; j++) {
        const RowLists<T>& list = lists[j / tile.rows * list_step + j % tile.rows];
        Acc* tile_row = scratch + j * columns * width;
        pass.entries = list.entries;
        pass.values = list.values;
        pass.starts = list.starts + slab * s_.starts;
        pass.from = slab == 0 ? zeros_ : tile_row;
        pass.from_step = slab == 0 ? 0 : width;
        pass.bias = last ? bias : zeros_;
        pass.to = tile_row;
        pass.to_step = width;
        if constexpr (kDense) {
          if (Acc* to = last ? sink_.direct(tile.row0 + j, first_column, out_channel, valid == width) : nullptr) {
            pass.to = to, pass.to_step = p_.out_channels, stored = true;
          }
        }
        accumulate(pass);
      }
    }
    if (stored) return;
    sink_.store(scratch, width, tile.t0, tile.steps, tile.row0, tile.rows, first_column, columns, out_channel, valid);
  }

  static bool all_empty(const RowLists<T>* lists, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      if (!lists[i].empty) return false;
    }
    return true;
  }

  const SfConv& p_;
  const ConvShape s_;
  const ListBuilder<T, Input> builder_;
  const char* packed_;
  const Sink& sink_;
  const bool graded_;
  const int threads_;
  const int64_t rows_;  // output rows of one time step
  int64_t steps_;       // time steps of a tile
  int64_t tile_rows_, column_tiles_, list_rows_;
  const void* bias_source_;
  Acc* bias_;
  Acc* zeros_;
  uint32_t* windows_;
  int64_t* shifts_;
  int64_t* costs_;
  Thread* per_thread_;
  Shares shares_;
  TileLists<T> shared_;
};

}  // namespace sparseflow::SF_NAMESPACE
