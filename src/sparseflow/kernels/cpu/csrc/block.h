// Fused blocks: what a convolution hands its sums to, and the same for sums that a dense convolution has made.
#pragma once

#include "abi.h"
#include "arena.h"
#include "neuron.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

SF_INLINE void clear_counts(const SfBlock& b) {
  if (b.row_counts == nullptr) return;
  __builtin_memset(b.row_counts, 0, b.steps * b.batch * (b.pixels / b.row_pixels) * sizeof(uint32_t));
}

// Rows of the result in one plane, and the first pixel in the map of the sums that goes into pixel `column` of a row.
SF_INLINE int64_t plane_rows(const SfBlock& b) { return b.map[1] / b.window[1]; }

SF_INLINE int64_t map_pixel(const SfBlock& b, int64_t row, int64_t column) {
  const int64_t plane = row / plane_rows(b) * b.window[0], in_plane = row % plane_rows(b) * b.window[1];
  return (plane * b.map[1] + in_plane) * b.map[2] + column * b.window[2];
}

// Receives finished sums of a convolution, row by row, and steps the neuron; see Conv for the protocol. Where windows do
// not cover the map, the convolution leaves out what they drop.
class BlockSink {
 public:
  using Input = uint8_t;  // graded spikes are counts

  explicit BlockSink(const SfBlock& block) : b_(block), fire_(find_fire(block.neuron)) { clear_counts(b_); }

  int64_t steps() const { return b_.steps; }

  // Tiles hold whole windows: a multiple of these rows, and of the windows' columns.
  int64_t row_multiple() const {
    return b_.window[0] == 1 ? b_.window[1] : b_.window[0] * b_.window[1] * plane_rows(b_);
  }

  int64_t column_multiple() const { return b_.window[2]; }

  // sums [steps][rows][columns][width] of rows row0.. (within one time step) at steps t0...
  void store(float* sums, int64_t width, int64_t t0, int64_t steps, int64_t row0, int64_t rows, int64_t column,
             int64_t columns, int64_t channel, int64_t valid) const {
    const int64_t per_image = b_.pixels / b_.row_pixels, plane = plane_rows(b_), row_floats = columns * width;
    const int64_t depth = b_.window[0], height = b_.window[1], first = column / b_.window[2];
    const int64_t of_rows = rows / (depth * height);  // of the result
    for (int64_t i = 0, n; i < of_rows; i += n) {
      const int64_t row = row0 / (depth * height) + i, in_image = row % per_image;
      n = !pools(b_) && columns == b_.row_pixels ? min(of_rows - i, per_image - in_image) : 1;  // whole rows in one run
      const int64_t pixels = n * (columns / b_.window[2]);
      const Run run{t0, steps, row / per_image, in_image * b_.row_pixels + first, pixels, channel, valid};
      const int64_t image_pixel = (run.t * b_.batch + run.n) * map_pixels(b_) + map_pixel(b_, in_image, first);
      float* x = sums + (i / plane * depth * plane + i % plane) * height * row_floats;
      const Sums at{x, rows * row_floats, width, row_floats, plane * height * row_floats, image_pixel};
      finish_run(b_, fire_, run, at, {x, at.step, at.pixel});
    }
  }

 private:
  const SfBlock& b_;
  const Fire fire_;
};

// Pixels that take all their steps together, so that their sums stay in L2.
SF_INLINE int64_t dense_pixels(const SfBlock& b) { return max(1, min(b.row_pixels, 4096 / max(1, b.channels))); }

// Memory of one thread for the maxima over windows, in bytes.
SF_INLINE int64_t dense_staging(const SfBlock& b) {
  return pools(b) ? b.steps * dense_pixels(b) * b.channels * int64_t(sizeof(float)) : 0;
}

// Dense sums [images, map pixels, channels] (or [batch, ...], the same at every step) through all that follows.
SF_INLINE int block_dense_rows(const SfBlock& b, const float* sums, int threads) {
  clear_counts(b);
  const Fire fire = find_fire(b.neuron);
  const int64_t per_image = b.pixels / b.row_pixels, rows = b.batch * per_image, row_floats = b.map[2] * b.channels;
  const int64_t image_floats = map_pixels(b) * b.channels, step = b.invariant ? 0 : b.batch * image_floats;
  const int64_t pixels = dense_pixels(b), staged = dense_staging(b);
  auto* memory = static_cast<char*>(sf_workspace(threads * staged));
  if (memory == nullptr && staged > 0) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const Target staging{reinterpret_cast<float*>(memory + thread_index() * staged), pixels * b.channels, b.channels};
    const int64_t n = r / per_image, row = r % per_image;
    for (int64_t p = 0; p < b.row_pixels; p += pixels) {
      const Run run{0, b.steps, n, row * b.row_pixels + p, min(pixels, b.row_pixels - p), 0, b.channels};
      const int64_t first = n * map_pixels(b) + map_pixel(b, row, p);
      const Sums at{sums + first * b.channels, step, b.channels, row_floats, b.map[1] * row_floats, first};
      finish_run(b, fire, run, at, staging);
    }
  }
  return 0;
}

}  // namespace sparseflow::SF_NAMESPACE
