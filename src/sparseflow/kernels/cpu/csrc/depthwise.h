// Depthwise convolution: every channel has its own filter, so there is no weight row to add. Many spikes: per output
// pixel and tap, 64 channels of weights are added under the mask of that tap's spikes. Few or graded ones: each is added
// to the outputs it reaches.
#pragma once

#include "abi.h"
#include "arena.h"
#include "events.h"
#include "simd.h"
#include "store.h"

namespace sparseflow::SF_NAMESPACE {

// sum + v in the lanes whose bit is set.
SF_INLINE VecF32 add_masked(VecF32 sum, uint64_t lanes, VecF32 v) {
#if defined(SF_AVX512)
  return (VecF32)_mm512_mask_add_ps((__m512)sum, (__mmask16)lanes, (__m512)sum, (__m512)v);
#else
  VecU32 bit;
  for (int i = 0; i < int(sizeof(VecU32) / 4); i++) bit[i] = 1u << i;
  const VecU32 off = (VecU32)((bit & (uint32_t)lanes) == 0);
  return sum + bit_cast<VecF32>(bit_cast<VecU32>(v) & ~off);
#endif
}

SF_INLINE VecF64 add_masked(VecF64 sum, uint64_t lanes, VecF64 v) {
#if defined(SF_AVX512)
  return (VecF64)_mm512_mask_add_pd((__m512d)sum, (__mmask8)lanes, (__m512d)sum, (__m512d)v);
#else
  VecU64 bit;
  for (int i = 0; i < int(sizeof(VecU64) / 8); i++) bit[i] = uint64_t{1} << i;
  const VecU64 off = (VecU64)((bit & lanes) == 0);
  return sum + bit_cast<VecF64>(bit_cast<VecU64>(v) & ~off);
#endif
}

template <class T>
class DepthwiseConv {
  using Element = typename T::Element;
  using Acc = typename T::Acc;
  using Vec = typename T::Vec;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kWidth = 64;  // channels at a time: one word
  static constexpr int kVectors = kWidth / L;
  static constexpr double kScatterDensity = 0.02;

 public:
  DepthwiseConv(const SfConv& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
                const void* bias, void* out, bool graded, int threads)
      : p_(p),
        s_(p),
        finder_(p_, s_, bits, row_counts),
        x_(static_cast<const Element*>(x)),
        packed_(static_cast<const Element*>(packed)),
        bias_source_(bias),
        output_{static_cast<Element*>(out), p.out_channels, s_.out_plane, p.out_channels_last != 0},
        graded_(graded),
        threads_(threads),
        padded_channels_(s_.pixel_words * kWidth) {
    int64_t events = 0;
    for (int64_t i = 0; i < p_.batch * p_.in_size[0] * p_.in_size[1]; i++) events += row_counts[i];
    scatter_ = graded || double(events) < kScatterDensity * double(p_.batch * p_.in_channels * s_.in_plane);
  }

  int run() {
    Arena sizes(nullptr);
    place(sizes);
    void* memory = sf_workspace(sizes.used());
    if (memory == nullptr) return 1;
    Arena arena(memory);
    place(arena);
    pad_bias<T>(bias_source_, 1, p_.out_channels, padded_channels_, bias_);
    for (int64_t i = 0; i < s_.tile_columns * p_.stride[2]; i++) {
      output_of_[i] = int32_t(i % p_.stride[2] == 0 ? i / p_.stride[2] : -1);
    }
    const int64_t column_tiles = ceil_div(p_.out_size[2], s_.tile_columns);
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t item = 0; item < s_.out_rows * column_tiles; item++) {
      const int64_t first = item % column_tiles * s_.tile_columns;
      add_row(item / column_tiles, first, min(s_.tile_columns, p_.out_size[2] - first));
    }
    return 0;
  }

 private:
  void place(Arena& arena) {
    bias_ = arena.take<Acc>(padded_channels_);
    output_of_ = arena.take<int32_t>(s_.tile_columns * p_.stride[2]);
    inputs_ = arena.take<InputRow>(threads_ * s_.kernel_rows);
    scratch_ = arena.take<Acc>(threads_ * s_.tile_columns * kWidth);
  }

  void add_row(int64_t row, int64_t first, int64_t pixels) const {
    InputRow* inputs = inputs_ + thread_index() * s_.kernel_rows;
    Acc* scratch = scratch_ + thread_index() * s_.tile_columns * kWidth;
    const int64_t n = finder_.find(row, 0, inputs);
    const int64_t per_image = p_.out_size[0] * p_.out_size[1];
    const int64_t image = row / per_image, out_pixel = row % per_image * p_.out_size[2] + first;
    for (int64_t word = 0; word < s_.pixel_words; word++) {
      const int64_t channel = word * kWidth, valid = min(kWidth, p_.in_channels - channel);
      Element* to = output_.at(image, channel, out_pixel);
      if (n == 0 && !output_.channels_last) {
        fill_planar<T>(bias_ + channel, pixels, valid, to, output_.plane);
        continue;
      }
      if (scatter_) {
        for (int64_t i = 0; i < pixels; i++) __builtin_memcpy(scratch + i * kWidth, bias_ + channel, kWidth * sizeof(Acc));
        for (int64_t i = 0; i < n; i++) scatter_row(inputs[i], first, pixels, word, scratch);
      } else {
        for (int64_t i = 0; i < pixels; i++) {
          gather_pixel(inputs, n, (first + i) * p_.stride[2] - p_.padding[2], word, scratch + i * kWidth);
        }
      }
      if (output_.channels_last) {
        store_channels_last<T>(scratch, kWidth, pixels, valid, to, output_.channels);
      } else {
        store_planar<T>(scratch, kWidth, pixels, valid, to, output_.plane);
      }
    }
  }

  const Element* weights(const InputRow& in, int64_t kx, int64_t word) const {
    return packed_ + ((word * s_.kernel_rows + in.kernel_row) * p_.kernel[2] + kx) * kWidth;
  }

  // Dense spikes, output-stationary: the masked weights of every tap of one pixel.
  void gather_pixel(const InputRow* inputs, int64_t n, int64_t x0, int64_t word, Acc* to) const {
    Vec sums[kVectors];
    for (int v = 0; v < kVectors; v++) sums[v] = load<Vec>(bias_ + word * kWidth + v * L);
    for (const InputRow* in = inputs; in < inputs + n; in++) {
      for (int64_t kx = 0; kx < p_.kernel[2]; kx++) {
        const int64_t column = x0 + kx * p_.dilation[2];
        if (column < 0 || column >= p_.in_size[2]) continue;
        const uint64_t bits = in->bits[column * s_.pixel_words + word];
        if (bits == 0) continue;
        Vec taps[kVectors];
        load_weights<T, kVectors>(weights(*in, kx, word), taps);
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; v++) sums[v] = add_masked(sums[v], bits >> (v * L), taps[v]);
      }
    }
    for (int v = 0; v < kVectors; v++) store(to + v * L, sums[v]);
  }

  // Few or graded spikes, spike-stationary: every event is added to the pixels its taps reach.
  void scatter_row(const InputRow& in, int64_t first, int64_t pixels, int64_t word, Acc* row) const {
    const int64_t channel_step = p_.x_channels_last ? 1 : s_.in_plane;
    const int64_t column_step = p_.x_channels_last ? p_.in_channels : 1;
    const Element* w = weights(in, 0, word);
    for (int64_t column = 0; column < p_.in_size[2]; column++) {
      uint64_t bits = in.bits[column * s_.pixel_words + word];
      for (; bits != 0; bits &= bits - 1) {
        const int64_t c = lowest_bit(bits);
        const Acc value =
            graded_ ? to_acc<T>(x_[in.x_offset + column * column_step + (word * kWidth + c) * channel_step]) : Acc(1);
        const Element* tap = w + packed_place<T>(c);
        for (int64_t kx = 0; kx < p_.kernel[2]; kx++, tap += kWidth) {
          const int64_t reached = column + p_.padding[2] - kx * p_.dilation[2] - first * p_.stride[2];
          if (reached < 0 || reached >= pixels * p_.stride[2] || output_of_[reached] < 0) continue;
          row[output_of_[reached] * kWidth + c] += to_acc<T>(*tap) * value;
        }
      }
    }
  }

  const SfConv& p_;
  const ConvShape s_;
  const InputRowFinder finder_;
  const Element* x_;
  const Element* packed_;
  const void* bias_source_;
  const OutputRun<T> output_;
  const bool graded_;
  bool scatter_;
  const int threads_;
  const int64_t padded_channels_;
  Acc* bias_;
  int32_t* output_of_;  // per column within a tile's reach: its output pixel, or -1 between strides
  InputRow* inputs_;
  Acc* scratch_;
};

}  // namespace sparseflow::SF_NAMESPACE
