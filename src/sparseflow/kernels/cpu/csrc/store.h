// Writing finished sums: from a scratch tile of accumulators [pixel][channel] to the output tensor, rounded to its
// dtype, in either layout.
#pragma once

#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

// [pixels][width] -> [pixels][stride], the first `channels` of each pixel.
template <class T>
void store_channels_last(const typename T::Acc* tile, int64_t width, int64_t pixels, int64_t channels,
                         typename T::Element* out, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t p = 0; p < pixels; p++) {
    const typename T::Acc* from = tile + p * width;
    typename T::Element* to = out + p * stride;
    int64_t c = 0;
    for (; c + L <= channels; c += L) T::narrow(to + c, load<typename T::Vec>(from + c));
    if (c < channels) narrow_partial<T>(to + c, load<typename T::Vec>(from + c), channels - c);
  }
}

// [pixels][width] -> [channels][plane], transposed in registers.
template <class T>
void store_planar(const typename T::Acc* tile, int64_t width, int64_t pixels, int64_t channels,
                  typename T::Element* out, int64_t plane) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t rows = min(L, channels - c);
    for (int64_t p = 0; p < pixels; p += L) {
      const int64_t columns = min(L, pixels - p);
      typename T::Vec v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) {
        v[i] = i < columns ? load<typename T::Vec>(tile + (p + i) * width + c) : typename T::Vec{};
      }
      transpose(v);
      typename T::Element* to = out + c * plane + p;
      if (columns == L && rows == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) T::narrow(to + i * plane, v[i]);
      } else {
        for (int64_t i = 0; i < rows; i++) narrow_partial<T>(to + i * plane, v[i], columns);
      }
    }
  }
}

// `pixels` neighbours of every one of `channels` planes become that channel's constant.
template <class T>
void fill_planar(const typename T::Acc* constants, int64_t pixels, int64_t channels, typename T::Element* out,
                 int64_t plane) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < channels; c++) {
    const typename T::Vec value = splat<T>(constants[c]);
    typename T::Element* to = out + c * plane;
    int64_t p = 0;
    for (; p + L <= pixels; p += L) T::narrow(to + p, value);
    if (p < pixels) narrow_partial<T>(to + p, value, pixels - p);
  }
}

// A run of neighbouring output pixels of one image.
template <class T>
struct OutputRun {
  typename T::Element* out;  // whole output tensor
  int64_t channels, plane;   // of the whole output
  bool channels_last;

  typename T::Element* at(int64_t image, int64_t channel, int64_t pixel) const {
    return channels_last ? out + (image * plane + pixel) * channels + channel
                         : out + (image * channels + channel) * plane + pixel;
  }
};

}  // namespace sparseflow::SF_NAMESPACE
