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

// Nothing lies between the sums and the neuron.
SF_INLINE bool plain(const SfBlock& b) {
  return b.scale == nullptr && b.shift == nullptr && residual_kind(b) == kNoResidual && !pools(b);
}

// Everything that follows the sums of one run. `staging` holds [pixels][step], and may be where the sums begin.
SF_INLINE void finish_run(const SfBlock& b, Fire fire, const Run& run, const Sums& sums, float* staging, int64_t step) {
  if (fire == nullptr) {
    float* to = b.out + ((run.t * b.batch + run.n) * b.pixels + run.pixel) * b.channels + run.first_channel;
    return currents(b, run, sums, to, b.channels);
  }
  if (plain(b)) return fire_run(b, fire, run, sums.x, sums.pixel);
  currents(b, run, sums, staging, step);
  fire_run(b, fire, run, staging, step);
}

// Rows of the result in one plane, and the first pixel in the map of the sums that goes into pixel `column` of a row.
SF_INLINE int64_t plane_rows(const SfBlock& b) { return b.map[1] / b.window[1]; }

SF_INLINE int64_t map_pixel(const SfBlock& b, int64_t row, int64_t column) {
  const int64_t plane = row / plane_rows(b) * b.window[0], in_plane = row % plane_rows(b) * b.window[1];
  return (plane * b.map[1] + in_plane) * b.map[2] + column * b.window[2];
}

SF_INLINE int64_t map_pixels(const SfBlock& b) { return b.map[0] * b.map[1] * b.map[2]; }

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
    for (int64_t s = 0; s < steps; s++, sums += rows * row_floats) {
      for (int64_t i = 0; i < rows / (depth * height); i++) {
        const int64_t row = row0 / (depth * height) + i, in_image = row % per_image;
        const Run run{t0 + s,  row / per_image, in_image * b_.row_pixels + first, columns / b_.window[2],
                      channel, valid};
        const int64_t image_pixel = (run.t * b_.batch + run.n) * map_pixels(b_) + map_pixel(b_, in_image, first);
        float* x = sums + (i / plane * depth * plane + i % plane) * height * row_floats;
        finish_run(b_, fire_, run, {x, width, row_floats, plane * height * row_floats, image_pixel}, x, width);
      }
    }
  }

 private:
  const SfBlock& b_;
  const Fire fire_;
};

// Pixels that are staged together, so that they stay in L1, and the memory of all threads for it in bytes.
SF_INLINE int64_t staged_pixels(const SfBlock& b) { return max(1, min(b.row_pixels, 4096 / max(1, b.channels))); }

SF_INLINE int64_t dense_staging(const SfBlock& b, int threads) {
  return threads * staged_pixels(b) * b.channels * int64_t(sizeof(float));
}

// Dense sums [images, map pixels, channels] (or [batch, ...], the same at every step) through all that follows.
SF_INLINE int block_dense_rows(const SfBlock& b, const float* sums, int threads) {
  clear_counts(b);
  const Fire fire = find_fire(b.neuron);
  const int64_t per_image = b.pixels / b.row_pixels, rows = b.batch * per_image, row_floats = b.map[2] * b.channels;
  const int64_t run_pixels = staged_pixels(b), staged = run_pixels * b.channels;
  const bool once = b.invariant && residual_kind(b) == kNoResidual;  // every step has the same currents
  auto* memory = static_cast<float*>(sf_workspace(dense_staging(b, threads)));
  if (memory == nullptr) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float* staging = memory + thread_index() * staged;
    const int64_t n = r / per_image, row = r % per_image;
    for (int64_t p = 0; p < b.row_pixels; p += run_pixels) {
      for (int64_t t = 0; t < b.steps; t++) {
        const Run run{t, n, row * b.row_pixels + p, min(run_pixels, b.row_pixels - p), 0, b.channels};
        const int64_t pixel = map_pixel(b, row, p), image = t * b.batch + n;
        const float* x = sums + ((b.invariant ? n : image) * map_pixels(b) + pixel) * b.channels;
        if (once && t > 0) {
          fire_run(b, fire, run, plain(b) ? x : staging, b.channels);
        } else {
          const Sums at{x, b.channels, row_floats, b.map[1] * row_floats, image * map_pixels(b) + pixel};
          finish_run(b, fire, run, at, staging, b.channels);
        }
      }
    }
  }
  return 0;
}

}  // namespace sparseflow::SF_NAMESPACE
