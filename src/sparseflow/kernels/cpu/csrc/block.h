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

// Receives finished sums of a convolution, row by row, and steps the neuron; see Conv for the protocol.
class BlockSink {
 public:
  using Input = uint8_t;  // graded spikes are counts

  explicit BlockSink(const SfBlock& block) : b_(block), fire_(find_fire(block.neuron)) { clear_counts(b_); }

  int64_t steps() const { return b_.steps; }

  // sums [steps][rows][columns][width] of rows row0.. (within one time step) at steps t0...
  void store(float* sums, int64_t width, int64_t t0, int64_t steps, int64_t row0, int64_t rows, int64_t column,
             int64_t columns, int64_t channel, int64_t valid) const {
    const int64_t per_image = b_.pixels / b_.row_pixels;
    for (int64_t s = 0; s < steps; s++) {
      for (int64_t i = 0; i < rows; i++, sums += columns * width) {
        const int64_t row = row0 + i;
        const Run run{t0 + s, row / per_image, row % per_image * b_.row_pixels + column, columns, channel, valid};
        finish_run(b_, fire_, run, sums, width, sums, width);
      }
    }
  }

 private:
  const SfBlock& b_;
  const Fire fire_;
};

// Dense sums [images, pixels, channels] (or [batch, ...], the same at every step) through epilogue and neuron.
SF_INLINE int block_dense_rows(const SfBlock& b, const float* sums, int threads) {
  clear_counts(b);
  const Fire fire = find_fire(b.neuron);
  const int64_t rows = b.batch * (b.pixels / b.row_pixels), row = b.row_pixels * b.channels;
  const int64_t run_pixels = max(1, min(b.row_pixels, 4096 / max(1, b.channels)));  // what is staged stays in L1
  const int64_t staged = run_pixels * b.channels;
  auto* memory = static_cast<float*>(sf_workspace(threads * staged * int64_t(sizeof(float))));
  if (memory == nullptr) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float* staging = memory + thread_index() * staged;
    const int64_t per_image = b.pixels / b.row_pixels, n = r / per_image, first = r % per_image * b.row_pixels;
    for (int64_t p = 0; p < b.row_pixels; p += run_pixels) {
      for (int64_t t = 0; t < b.steps; t++) {
        const Run run{t, n, first + p, min(run_pixels, b.row_pixels - p), 0, b.channels};
        const float* x = sums + ((b.invariant ? 0 : t * rows) + r) * row + p * b.channels;
        finish_run(b, fire, run, x, b.channels, staging, b.channels);
      }
    }
  }
  return 0;
}

}  // namespace sparseflow::SF_NAMESPACE
