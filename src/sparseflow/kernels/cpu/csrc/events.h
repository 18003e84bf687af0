// Stage 1b: from bits to lists of weight rows, one list per output row, walked by a sliding window.
//
// An entry is the byte offset of a weight row. Packed weights are ordered [kernel row][channel][kx], a "kernel row" r
// being one of R (kd, kh) pairs, and an event of channel c in input column j (counted in dilation steps) is written as
//   ((r * C + c) * KW + j) * row_bytes.
// Seen from the output pixel whose window starts at column j0 the row wanted is kx = j - j0, so the pixel subtracts
// j0 * row_bytes from the weight pointer, and its whole receptive field is the contiguous run of entries of columns
// j0 .. j0 + KW - 1. Each event is written once per kernel row instead of once per tap.
#pragma once

#include "abi.h"
#include "prescan.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

constexpr int64_t kListSlack = 64;  // entries that may be written past the end of a list

// Appends base + scale * i for every set bit i of a word; may write up to 16 entries past the end it returns. Meant to live
// in registers, as a local.
class EventWriter {
 public:
#if defined(SF_VBMI)
  explicit EventWriter(uint32_t scale) : scale_(_mm512_set1_epi32((int)scale)) {
    alignas(64) static const uint8_t kLanes64[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
        32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    lanes_ = _mm512_load_si512(kLanes64);
  }

  SF_INLINE_MEMBER uint32_t* append(uint64_t bits, uint32_t base, uint32_t* out, int64_t = 64) const {
    __m512i channels = _mm512_maskz_compress_epi8(bits, lanes_);
    const __m512i bases = _mm512_set1_epi32((int)base);
    const int n = popcount(bits);
    for (int i = 0;;) {
      const __m512i c = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(channels));
      _mm512_storeu_si512(out + i, _mm512_add_epi32(_mm512_mullo_epi32(c, scale_), bases));
      i += 16;
      if (__builtin_expect(i >= n, 1)) return out + n;
      channels = _mm512_alignr_epi64(_mm512_setzero_si512(), channels, 2);
    }
  }

 private:
  const __m512i scale_;
  __m512i lanes_;
#elif defined(SF_AVX512)
  explicit EventWriter(uint32_t scale) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i channels = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * i));
      offsets_[i] = _mm512_mullo_epi32(channels, _mm512_set1_epi32((int)scale));
    }
  }

  // Bits from `word_channels` on are zero.
  SF_INLINE_MEMBER uint32_t* append(uint64_t bits, uint32_t base, uint32_t* out, int64_t word_channels = 64) const {
    const __m512i bases = _mm512_set1_epi32((int)base);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, bits >>= 16) {
      if (16 * i >= word_channels) break;
      const __m512i entries = _mm512_add_epi32(offsets_[i], bases);
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)bits, entries));
      out += popcount(bits & 0xffff);
    }
    return out;
  }

 private:
  __m512i offsets_[4];
#else
  explicit EventWriter(uint32_t scale) : scale_(scale) {}

  SF_INLINE_MEMBER uint32_t* append(uint64_t bits, uint32_t base, uint32_t* out, int64_t = 64) const {
    for (; bits != 0; bits &= bits - 1) *out++ = base + scale_ * (uint32_t)lowest_bit(bits);
    return out;
  }

 private:
  const uint32_t scale_;
#endif
};

// The values of the set bits: tensor elements, or counts of spikes.
template <class T, class Input>
SF_INLINE typename T::Acc* append_values(uint64_t bits, const Input* x, int64_t stride, typename T::Acc* out) {
  for (; bits != 0; bits &= bits - 1) {
    const Input value = x[lowest_bit(bits) * stride];
    if constexpr (sizeof(Input) == 1) {
      *out++ = typename T::Acc(value);
    } else {
      *out++ = to_acc<T>(value);
    }
  }
  return out;
}

// Sizes that follow from a convolution's parameters and stay the same for all its tiles.
struct ConvShape {
  int64_t channels;         // input channels of one group
  int64_t outputs;          // output channels of one group
  int64_t words;            // words of one group's channels
  int64_t pixel_words;      // words of one pixel
  int64_t kernel_rows;      // kd * kh
  int64_t blocks;           // packed output blocks of one group
  int64_t weight_rows;      // packed weight rows of one block
  int64_t out_rows;         // batch * od * oh
  int64_t in_plane, out_plane;
  int64_t pairs, slabs;     // (kernel row, word) pairs, and passes over them
  int64_t tile_columns;     // output columns of a tile
  int64_t phase_columns;    // input columns of one dilation phase that a tile reads
  int64_t columns;          // the same in all phases
  int64_t starts;           // list starts per slab: one per column and an end
  int64_t list_capacity;    // entries of one output row

  explicit ConvShape(const SfConv& p) {
    channels = p.in_channels / p.groups;
    outputs = p.out_channels / p.groups;
    words = ceil_div(channels, 64);
    pixel_words = ceil_div(p.in_channels, 64);
    kernel_rows = p.kernel[0] * p.kernel[1];
    blocks = ceil_div(outputs, p.block);
    weight_rows = kernel_rows * p.kernel[2] * channels;
    out_rows = p.batch * p.out_size[0] * p.out_size[1];
    in_plane = p.in_size[0] * p.in_size[1] * p.in_size[2];
    out_plane = p.out_size[0] * p.out_size[1] * p.out_size[2];
    pairs = kernel_rows * words;
    slabs = ceil_div(pairs, p.slab);
    tile_columns = min(p.out_size[2], p.tile);
    const int64_t reach = (tile_columns - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1;
    phase_columns = ceil_div(reach, p.dilation[2]);
    columns = phase_columns * p.dilation[2];
    starts = columns + 1;
    list_capacity = columns * kernel_rows * channels + kListSlack;
  }
};

// Where the lists of one output row live.
template <class T>
struct RowLists {
  uint32_t* entries;
  typename T::Acc* values;  // null for binary input
  uint32_t* starts;         // [slabs][phase][column] and an end each
  bool empty;
};

// One kernel row that meets at least one event.
struct InputRow {
  int64_t kernel_row;
  const uint64_t* bits;
  int64_t x_offset;  // element offset of the row's first pixel, first channel of the group
};

// The words of an input row that belong to one slab.
struct Span {
  const uint64_t* bits;   // first word of the span, or of the pixel if channels are grouped
  int64_t first, words;   // counted within the group
  uint32_t offset;        // of the first word's weight rows
  const void* x;          // the first word's first channel in the row's first pixel
};

// Finds the input rows that an output row reads and that hold events.
class InputRowFinder {
 public:
  InputRowFinder(const SfConv& p, const ConvShape& shape, const uint64_t* bits, const uint32_t* row_counts)
      : p_(p), s_(shape), bits_(bits), row_counts_(row_counts) {}

  // Writes at most kernel_rows entries and returns how many.
  int64_t find(int64_t row, int64_t first_channel, InputRow* inputs) const {
    int64_t found = 0;
    for_each(row, [&](int64_t kernel_row, int64_t image, int64_t in_row) {
      if (row_counts_[in_row] == 0) return;
      const int64_t pixel = in_row * p_.in_size[2];
      const int64_t x_offset = p_.x_channels_last
                                   ? pixel * p_.in_channels + first_channel
                                   : (image * p_.in_channels + first_channel - image) * s_.in_plane + pixel;
      inputs[found++] = {kernel_row, bits_ + pixel * s_.pixel_words, x_offset};
    });
    return found;
  }

  int64_t count_events(int64_t row) const {
    int64_t events = 0;
    for_each(row, [&](int64_t, int64_t, int64_t in_row) { events += row_counts_[in_row]; });
    return events;
  }

 private:
  // visit(kernel row, image, input row) for the kernel rows that fall inside the input.
  template <class Visit>
  SF_INLINE_MEMBER void for_each(int64_t row, Visit visit) const {
    const int64_t oh = row % p_.out_size[1], od = row / p_.out_size[1] % p_.out_size[0];
    const int64_t n = row / p_.out_size[1] / p_.out_size[0];
    for (int64_t kd = 0; kd < p_.kernel[0]; kd++) {
      const int64_t d = od * p_.stride[0] - p_.padding[0] + kd * p_.dilation[0];
      if (d < 0 || d >= p_.in_size[0]) continue;
      for (int64_t kh = 0; kh < p_.kernel[1]; kh++) {
        const int64_t h = oh * p_.stride[1] - p_.padding[1] + kh * p_.dilation[1];
        if (h < 0 || h >= p_.in_size[1]) continue;
        visit(kd * p_.kernel[1] + kh, n, (n * p_.in_size[0] + d) * p_.in_size[1] + h);
      }
    }
  }

  const SfConv& p_;
  const ConvShape& s_;
  const uint64_t* bits_;
  const uint32_t* row_counts_;
};

template <class T, class Input>
class ListBuilder {
 public:
  ListBuilder(const SfConv& p, const ConvShape& shape, const Input* x, const uint64_t* bits, const uint32_t* row_counts)
      : p_(p),
        s_(shape),
        x_(x),
        finder_(p, shape, bits, row_counts),
        row_bytes_(uint32_t(p.block * sizeof(typename T::Element))),
        channel_bytes_(uint32_t(p.kernel[2]) * row_bytes_) {}

  int64_t count_events(int64_t row) const { return finder_.count_events(row); }

  // Lists of output row `row`, columns from first_column on, input channels of `group`. `inputs` and `spans` are
  // scratch for kernel_rows elements.
  void build(int64_t row, int64_t first_column, int64_t group, InputRow* inputs, Span* spans, RowLists<T>& out) const {
    const int64_t n = finder_.find(row, group * s_.channels, inputs);
    out.empty = n == 0;
    if (out.empty) {
      __builtin_memset(out.starts, 0, s_.slabs * s_.starts * sizeof(uint32_t));
      return;
    }
    const int64_t x0 = first_column * p_.stride[2] - p_.padding[2];
    const bool mostly_silent = finder_.count_events(row) * 4 < n * s_.pixel_words * p_.in_size[2];
    Cursor at{out.entries, out.values};
    for (int64_t slab = 0; slab < s_.slabs; slab++) {
      const Slab view{spans, find_spans(slab, inputs, n, spans), group, mostly_silent};
      uint32_t* starts = out.starts + slab * s_.starts;
      for (int64_t phase = 0; phase < p_.dilation[2]; phase++, starts += s_.phase_columns) {
        append_phase(view, x0 + phase, out.entries, starts, at);
      }
      *starts = uint32_t(at.entry - out.entries);
    }
  }

 private:
  struct Cursor {
    uint32_t* entry;
    typename T::Acc* value;
  };

  struct Slab {
    const Span* spans;
    int64_t count, group;
    bool mostly_silent;  // most words are zero: a branch around them predicts well
  };

  // The parts of the input rows that belong to a slab.
  int64_t find_spans(int64_t slab, const InputRow* inputs, int64_t n, Span* spans) const {
    int64_t found = 0;
    for (const InputRow* in = inputs; in < inputs + n; in++) {
      const int64_t pair = in->kernel_row * s_.words;
      const int64_t first = max(0, slab * p_.slab - pair), last = min(s_.words, (slab + 1) * p_.slab - pair);
      if (first >= last) continue;
      const int64_t channel_step = p_.x_channels_last ? 1 : s_.in_plane;
      spans[found++] = {in->bits + (p_.groups == 1 ? first : 0),
                        first,
                        last - first,
                        uint32_t(in->kernel_row * s_.channels + 64 * first) * channel_bytes_,
                        x_ + in->x_offset + 64 * first * channel_step};
    }
    return found;
  }

  // The columns x0, x0 + dilation, ... of one dilation phase.
  void append_phase(const Slab& slab, int64_t x0, const uint32_t* entries, uint32_t* starts, Cursor& at) const {
    const int64_t d = p_.dilation[2], n = s_.phase_columns;
    const int64_t begin = min(n, x0 >= 0 ? 0 : ceil_div(-x0, d));
    const int64_t end = max(begin, min(n, x0 >= p_.in_size[2] ? 0 : ceil_div(p_.in_size[2] - x0, d)));
    for (int64_t j = 0; j < begin; j++) starts[j] = uint32_t(at.entry - entries);
    if (p_.groups > 1 || at.value != nullptr) {
      append_any(slab, x0, begin, end, entries, starts, at);
    } else if (slab.mostly_silent) {
      append_plain<true>(slab, x0, begin, end, entries, starts, at);
    } else {
      append_plain<false>(slab, x0, begin, end, entries, starts, at);
    }
    for (int64_t j = end; j < n; j++) starts[j] = uint32_t(at.entry - entries);
  }

  // Whether strides jump over column j of a phase.
  SF_INLINE_MEMBER bool skips(int64_t j) const {
    return p_.stride[2] > p_.kernel[2] && p_.dilation[2] == 1 && j % p_.stride[2] >= p_.kernel[2];
  }

  // Columns begin .. end of a phase. What the loops read is local: a store to the list might change anything else.
  template <bool kMostlySilent>
  void append_plain(const Slab& slab, int64_t x0, int64_t begin, int64_t end, const uint32_t* entries, uint32_t* starts,
                    Cursor& at) const {
    const EventWriter writer(channel_bytes_);
    const Span* const last = slab.spans + slab.count;
    const int64_t pixel_words = s_.pixel_words, dilation = p_.dilation[2], channels = s_.channels;
    const uint32_t row_bytes = row_bytes_, word_bytes = 64 * channel_bytes_;
    uint32_t* entry = at.entry;
    for (int64_t j = begin; j < end; j++) {
      starts[j] = uint32_t(entry - entries);
      if (skips(j)) continue;
      for (const Span* span = slab.spans; span < last; span++) {
        const uint64_t* words = span->bits + (x0 + j * dilation) * pixel_words;
        const int64_t n = span->words, left = channels - 64 * span->first;
        uint32_t offset = uint32_t(j) * row_bytes + span->offset;
        for (int64_t w = 0; w < n; w++, offset += word_bytes) {
          const uint64_t bits = words[w];
          if (kMostlySilent && bits == 0) continue;
          entry = writer.append(bits, offset, entry, left - 64 * w);
        }
      }
    }
    at.entry = entry;
  }

  // The same for graded spikes and groups of channels.
  void append_any(const Slab& slab, int64_t x0, int64_t begin, int64_t end, const uint32_t* entries, uint32_t* starts,
                  Cursor& at) const {
    const EventWriter writer(channel_bytes_);
    const int64_t channel_step = p_.x_channels_last ? 1 : s_.in_plane;
    const int64_t column_step = p_.x_channels_last ? p_.in_channels : 1;
    for (int64_t j = begin; j < end; j++) {
      starts[j] = uint32_t(at.entry - entries);
      if (skips(j)) continue;
      const int64_t column = x0 + j * p_.dilation[2];
      for (const Span* span = slab.spans; span < slab.spans + slab.count; span++) {
        const uint64_t* words = span->bits + column * s_.pixel_words;
        const auto* x = static_cast<const Input*>(span->x) + column * column_step;
        uint32_t offset = uint32_t(j) * row_bytes_ + span->offset;
        for (int64_t w = 0; w < span->words; w++, offset += 64 * channel_bytes_, x += 64 * channel_step) {
          const uint64_t bits = p_.groups == 1 ? words[w] : group_bits(words, slab.group, span->first + w);
          if (at.value != nullptr) at.value = append_values<T, Input>(bits, x, channel_step, at.value);
          at.entry = writer.append(bits, offset, at.entry);
        }
      }
    }
  }

  uint64_t group_bits(const uint64_t* pixel, int64_t group, int64_t w) const {
    return read_bits(pixel, group * s_.channels + 64 * w, min(64, s_.channels - 64 * w));
  }

  const SfConv& p_;
  const ConvShape& s_;
  const Input* x_;
  InputRowFinder finder_;
  const uint32_t row_bytes_;      // of one weight row
  const uint32_t channel_bytes_;  // of all its columns
};

}  // namespace sparseflow::SF_NAMESPACE
