// Operations on packed spikes: no arithmetic per value, one word is 64 channels of a pixel.
#pragma once

#include "abi.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

// out [pixels, channels] float32 from bits [pixels, words], or from counts where there are any.
SF_INLINE void unpack_spikes(const uint64_t* bits, const uint8_t* counts, int64_t pixels, int64_t channels, float* out,
                             int threads) {
  const int64_t words = ceil_div(channels, 64);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t p = 0; p < pixels; p++) {
    float* to = out + p * channels;
    if (counts != nullptr) {
      const uint8_t* from = counts + p * channels;
      for (int64_t c = 0; c < channels; c++) to[c] = float(from[c]);
      continue;
    }
    int64_t c = 0;
    for (; c + kFloats <= channels; c += kFloats) store(to + c, ones_where(lanes_of(uint32_t(bits[p * words + c / 64] >> (c % 64) & low_bits(kFloats)))));
    for (; c < channels; c++) to[c] = float(bits[p * words + c / 64] >> (c % 64) & 1);
  }
}

SF_INLINE uint32_t count_row(const uint64_t* bits, int64_t words) {
  uint32_t count = 0;
  for (int64_t w = 0; w < words; w++) count += uint32_t(popcount(bits[w]));
  return count;
}

// Values of one pixel as bytes.
SF_INLINE void widen_pixel(const uint64_t* bits, const uint8_t* counts, int64_t channels, uint8_t* to) {
  if (counts != nullptr) {
    __builtin_memcpy(to, counts, channels);
    return;
  }
  for (int64_t c = 0; c < channels; c++) to[c] = uint8_t(bits[c / 64] >> (c % 64) & 1);
}

// Sums of two spike tensors, at most 255; rows of row_pixels pixels.
SF_INLINE void add_spikes(const uint64_t* a_bits, const uint8_t* a_counts, const uint64_t* b_bits,
                          const uint8_t* b_counts, int64_t rows, int64_t row_pixels, int64_t channels, uint64_t* bits,
                          uint8_t* counts, uint32_t* row_counts, int threads) {
  const int64_t words = ceil_div(channels, 64);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t p = r * row_pixels; p < (r + 1) * row_pixels; p++) {
      for (int64_t c0 = 0; c0 < channels; c0 += 64) {
        const int64_t n = min(64, channels - c0), w = p * words + c0 / 64;
        uint8_t left[64] = {}, right[64] = {};
        widen_pixel(a_bits + w, a_counts ? a_counts + p * channels + c0 : nullptr, n, left);
        widen_pixel(b_bits + w, b_counts ? b_counts + p * channels + c0 : nullptr, n, right);
        for (int i = 0; i < 64; i++) {
          const unsigned sum = unsigned(left[i]) + right[i];
          left[i] = uint8_t(sum > 255 ? 255 : sum);
        }
        __builtin_memcpy(counts + p * channels + c0, left, n);
        bits[w] = a_bits[w] | b_bits[w];
      }
    }
    row_counts[r] = count_row(bits + r * row_pixels * words, row_pixels * words);
  }
}

enum Logical { kAnd = 0, kAndNot = 1, kOr = 2 };

SF_INLINE void combine_spikes(const uint64_t* a, const uint64_t* b, int op, int64_t rows, int64_t row_words,
                              uint64_t* bits, uint32_t* row_counts, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t w = r * row_words; w < (r + 1) * row_words; w++) {
      bits[w] = op == kAnd ? a[w] & b[w] : op == kAndNot ? a[w] & ~b[w] : a[w] | b[w];
    }
    row_counts[r] = count_row(bits + r * row_words, row_words);
  }
}

// Calls visit(number of the first pixel) for every input row that the windows of an output row read.
template <class Visit>
SF_INLINE void for_rows(const SfPool& s, int64_t image, int64_t od, int64_t oh, Visit visit) {
  for (int64_t kd = 0; kd < s.kernel[0]; kd++) {
    const int64_t d = od * s.stride[0] - s.padding[0] + kd * s.dilation[0];
    if (d < 0 || d >= s.in_size[0]) continue;
    for (int64_t kh = 0; kh < s.kernel[1]; kh++) {
      const int64_t h = oh * s.stride[1] - s.padding[1] + kh * s.dilation[1];
      if (h >= 0 && h < s.in_size[1]) visit(((image * s.in_size[0] + d) * s.in_size[1] + h) * s.in_size[2]);
    }
  }
}

// Calls visit(number of an input pixel) for every pixel of the window of an output pixel.
template <class Visit>
SF_INLINE void for_window(const SfPool& s, int64_t image, int64_t od, int64_t oh, int64_t ow, Visit visit) {
  for_rows(s, image, od, oh, [&](int64_t row) {
    for (int64_t kw = 0; kw < s.kernel[2]; kw++) {
      const int64_t w = ow * s.stride[2] - s.padding[2] + kw * s.dilation[2];
      if (w >= 0 && w < s.in_size[2]) visit(row + w);
    }
  });
}

// Adds the spikes of one input row to an output row: tap by tap, for the output pixels whose tap lies in the row.
SF_INLINE void pool_row(const SfPool& s, const uint64_t* x, int64_t words, uint64_t* to) {
  for (int64_t kw = 0; kw < s.kernel[2]; kw++) {
    const int64_t shift = s.padding[2] - kw * s.dilation[2], last = s.in_size[2] - 1 + shift;
    const int64_t begin = shift > 0 ? ceil_div(shift, s.stride[2]) : 0;
    const int64_t end = last < 0 ? 0 : min(s.out_size[2], last / s.stride[2] + 1);
    for (int64_t ow = begin; ow < end; ow++) {
      const uint64_t* from = x + (ow * s.stride[2] - shift) * words;
      for (int64_t w = 0; w < words; w++) to[ow * words + w] |= from[w];
    }
  }
}

SF_INLINE void max_pool_spikes(const SfPool& s, const uint64_t* x, uint64_t* bits, uint32_t* row_counts, int threads) {
  const int64_t words = ceil_div(s.channels, 64), rows = s.images * s.out_size[0] * s.out_size[1];
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const int64_t oh = r % s.out_size[1], od = r / s.out_size[1] % s.out_size[0], image = r / s.out_size[1] / s.out_size[0];
    uint64_t* to = bits + r * s.out_size[2] * words;
    __builtin_memset(to, 0, s.out_size[2] * words * sizeof(uint64_t));
    for_rows(s, image, od, oh, [&](int64_t row) { pool_row(s, x + row * words, words, to); });
    row_counts[r] = count_row(to, s.out_size[2] * words);
  }
}

// How many pixels of a window PyTorch divides by along one dimension: padding counts where it is included.
SF_INLINE int64_t divisor(const SfPool& s, int axis, int64_t o) {
  const int64_t first = o * s.stride[axis] - s.padding[axis];
  const int64_t last = min(first + s.kernel[axis], s.in_size[axis] + s.padding[axis]);
  return s.include_pad ? last - first : min(last, s.in_size[axis]) - max(first, 0);
}

// out [images, out pixels, channels] float32.
SF_INLINE void avg_pool_spikes(const SfPool& s, const uint64_t* x, const uint8_t* counts, float* out, int threads) {
  const int64_t words = ceil_div(s.channels, 64), rows = s.images * s.out_size[0] * s.out_size[1];
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const int64_t oh = r % s.out_size[1], od = r / s.out_size[1] % s.out_size[0], image = r / s.out_size[1] / s.out_size[0];
    for (int64_t ow = 0; ow < s.out_size[2]; ow++) {
      float* to = out + (r * s.out_size[2] + ow) * s.channels;
      const float by = float(divisor(s, 0, od) * divisor(s, 1, oh) * divisor(s, 2, ow));
      for (int64_t c0 = 0; c0 < s.channels; c0 += 64) {
        const int64_t n = min(64, s.channels - c0);
        int32_t sums[64] = {};
        for_window(s, image, od, oh, ow, [&](int64_t pixel) {
          if (counts != nullptr) {
            for (int64_t i = 0; i < n; i++) sums[i] += counts[pixel * s.channels + c0 + i];
          } else {
            for (uint64_t word = x[pixel * words + c0 / 64]; word != 0; word &= word - 1) sums[lowest_bit(word)]++;
          }
        });
        for (int64_t i = 0; i < n; i++) to[c0 + i] = float(sums[i]) / by;
      }
    }
  }
}

// Channels of `parts` tensors of the same pixels side by side.
SF_INLINE void concat_spikes(int parts, const uint64_t* const* bits, const int64_t* channels, int64_t rows,
                             int64_t row_pixels, uint64_t* out, uint32_t* row_counts, int threads) {
  int64_t total = 0;
  for (int i = 0; i < parts; i++) total += channels[i];
  const int64_t words = ceil_div(total, 64);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t p = r * row_pixels; p < (r + 1) * row_pixels; p++) {
      uint64_t* to = out + p * words;
      for (int64_t w = 0; w < words; w++) to[w] = 0;
      for (int64_t i = 0, at = 0; i < parts; at += channels[i++]) {
        const int64_t part_words = ceil_div(channels[i], 64);
        for (int64_t w = 0; w < part_words; w++) {
          const uint64_t word = bits[i][p * part_words + w];
          const int64_t place = at + 64 * w;
          to[place / 64] |= word << (place % 64);
          if (place % 64 != 0 && place / 64 + 1 < words) to[place / 64 + 1] |= word >> (64 - place % 64);
        }
      }
    }
    row_counts[r] = count_row(out + r * row_pixels * words, row_pixels * words);
  }
}

}  // namespace sparseflow::SF_NAMESPACE
