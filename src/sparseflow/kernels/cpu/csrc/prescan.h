// Stage 1a: one pass over x that packs "x != 0" to bits, 64 channels of one pixel a word, and counts.
//
// Works on the bit patterns: a value is an event when anything but its sign bit is set. That makes NaN and denormals
// events and -0.0 none, whatever the floating-point mode.
#pragma once

#include "abi.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

// Turns runs of elements into masks of nonzeros and remembers whether every nonzero was exactly one.
template <class T>
class NonzeroScanner {
 public:
  using Bits = typename T::Bits;

  // Bit i of the result: p[i] is an event. Reads exactly n <= 64 elements.
  SF_INLINE_MEMBER uint64_t scan(const Bits* p, int64_t n) {
    if (n == 64) return scan64(p);
#if defined(SF_AVX512)
    uint64_t mask = 0;
    for (int64_t i = 0; i < n; i += kWidth) mask |= test(load_first(p + i, n - i), other_) << i;
    return mask;
#else
    Bits padded[64] = {};
    __builtin_memcpy(padded, p, n * sizeof(Bits));
    return scan64(padded);
#endif
  }

  bool only_ones() const {
    Bits lanes[kWidth];
    store(lanes, other_);
    Bits any = 0;
    for (Bits lane : lanes) any |= lane;
    return any == 0;
  }

 private:
  static constexpr int kWidth = SF_VECTOR_BYTES / sizeof(Bits);
  static constexpr Bits kMagnitude = Bits(~Bits{0}) >> 1;

  SF_INLINE_MEMBER uint64_t scan64(const Bits* p) {
    // A local: as a member it would be stored and reloaded around every write to the output.
    Vector other = other_;
    uint64_t mask = 0;
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += kWidth) mask |= test(load<Vector>(p + i), other) << i;
    other_ = other;
    return mask;
  }

#if defined(SF_AVX512)
  using Vector = __m512i;

  SF_INLINE Vector load_first(const Bits* p, int64_t n) {
    const uint64_t lanes = low_bits(n);
    if constexpr (sizeof(Bits) == 2) return _mm512_maskz_loadu_epi16((__mmask32)lanes, p);
    if constexpr (sizeof(Bits) == 4) return _mm512_maskz_loadu_epi32((__mmask16)lanes, p);
    if constexpr (sizeof(Bits) == 8) return _mm512_maskz_loadu_epi64((__mmask8)lanes, p);
  }

  // min(|x|, x ^ one) is zero exactly when x is 0, -0 or 1.
  SF_INLINE uint64_t test(Vector x, Vector& other) {
    if constexpr (sizeof(Bits) == 2) {
      const Vector a = _mm512_and_si512(x, _mm512_set1_epi16((short)kMagnitude));
      other |= _mm512_min_epu16(a, _mm512_xor_si512(x, _mm512_set1_epi16((short)T::kOne)));
      return _mm512_test_epi16_mask(a, a);
    } else if constexpr (sizeof(Bits) == 4) {
      const Vector a = _mm512_and_si512(x, _mm512_set1_epi32((int)kMagnitude));
      other |= _mm512_min_epu32(a, _mm512_xor_si512(x, _mm512_set1_epi32((int)T::kOne)));
      return _mm512_test_epi32_mask(a, a);
    } else {
      const Vector a = _mm512_and_si512(x, _mm512_set1_epi64((long long)kMagnitude));
      other |= _mm512_min_epu64(a, _mm512_xor_si512(x, _mm512_set1_epi64((long long)T::kOne)));
      return _mm512_test_epi64_mask(a, a);
    }
  }

  Vector other_ = _mm512_setzero_si512();
#else
  typedef Bits Vector __attribute__((vector_size(SF_VECTOR_BYTES)));

  SF_INLINE uint64_t test(Vector x, Vector& other) {
    const Vector zero = (Vector)((x & kMagnitude) == 0);
    other |= ~(zero | (Vector)(x == T::kOne));
    return lane_mask(~zero);
  }

  SF_INLINE uint64_t lane_mask(Vector lanes) {
#if defined(SF_AVX2)
    if constexpr (sizeof(Bits) == 8) return (uint32_t)_mm256_movemask_pd((__m256d)lanes);
    if constexpr (sizeof(Bits) == 4) return (uint32_t)_mm256_movemask_ps((__m256)lanes);
    const uint32_t bytes = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16((__m256i)lanes, _mm256_setzero_si256()));
    return (bytes & 0xff) | (bytes >> 8 & 0xff00);
#elif defined(__SSE2__)
    if constexpr (sizeof(Bits) == 8) return (uint32_t)_mm_movemask_pd((__m128d)lanes);
    if constexpr (sizeof(Bits) == 4) return (uint32_t)_mm_movemask_ps((__m128)lanes);
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16((__m128i)lanes, _mm_setzero_si128()));
#else
    uint64_t mask = 0;
    for (int i = 0; i < kWidth; i++) mask |= uint64_t(lanes[i] & 1) << i;
    return mask;
#endif
  }

  Vector other_ = {};
#endif
};

// Transposes a 64 x 64 bit matrix in place: bit p of m[c] becomes bit c of m[p].
SF_INLINE void transpose_bits(uint64_t (&m)[64]) {
#if defined(SF_AVX512)
  // Byte b of 64 words, gathered: 8x8 bytes within vectors, then 8x8 quadwords between them.
#if defined(SF_VBMI)
  alignas(64) static const uint8_t kByteOrder[64] = {
      0, 8,  16, 24, 32, 40, 48, 56, 1, 9,  17, 25, 33, 41, 49, 57, 2, 10, 18, 26, 34, 42, 50, 58, 3, 11, 19, 27, 35, 43, 51, 59,
      4, 12, 20, 28, 36, 44, 52, 60, 5, 13, 21, 29, 37, 45, 53, 61, 6, 14, 22, 30, 38, 46, 54, 62, 7, 15, 23, 31, 39, 47, 55, 63};
  const __m512i order = _mm512_load_si512(kByteOrder);
  const auto gather = [&](__m512i words) { return _mm512_permutexvar_epi8(order, words); };
#else
  // Without byte permutation: pairs of bytes within 128 bits, then the pairs.
  const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  alignas(64) static const uint16_t kPairOrder[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                                      4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
  const __m512i order = _mm512_load_si512(kPairOrder);
  const auto gather = [&](__m512i words) {
    return _mm512_permutexvar_epi16(order, _mm512_shuffle_epi8(words, pairs));
  };
#endif
  VecF64 rows[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) rows[k] = (VecF64)gather(_mm512_loadu_si512(m + 8 * k));
  transpose(rows);
#pragma GCC unroll 8
  for (int b = 0; b < 8; b++) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) m[8 * b + j] = _mm512_movepi8_mask(_mm512_slli_epi16((__m512i)rows[b], 7 - j));
  }
#else
  // Hacker's Delight, section 7-3.
  uint64_t mask = 0xffffffffu;
  for (int j = 32; j != 0; j >>= 1, mask ^= mask << j) {
    for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
      const uint64_t t = ((m[k] >> j) ^ m[k | j]) & mask;
      m[k] ^= t << j;
      m[k | j] ^= t;
    }
  }
#endif
}

// 64 bits of a bit string from bit `first` on; reads no word past the one that holds bit first + n - 1.
SF_INLINE uint64_t read_bits(const uint64_t* words, int64_t first, int64_t n) {
  const int64_t word = first >> 6;
  const int shift = int(first & 63);
  uint64_t bits = words[word] >> shift;
  if (shift + n > 64) bits |= words[word + 1] << (64 - shift);
  return bits & low_bits(n);
}

// Few channels: 64 pixels of C values are C full words of a bit string; cut it into one word a pixel.
template <class T>
void pack_narrow_pixels(NonzeroScanner<T>& scanner, const typename T::Bits* x, int64_t pixels, int64_t channels,
                        uint64_t* bits) {
  uint64_t flat[64];
  const int64_t elements = pixels * channels;
  for (int64_t i = 0; i < elements; i += 64) flat[i / 64] = scanner.scan(x + i, min(64, elements - i));
  for (int64_t p = 0; p < pixels; p++) bits[p] = read_bits(flat, p * channels, channels);
}

template <class T>
void pack_channels_last(NonzeroScanner<T>& scanner, const SfScan& s, const typename T::Bits* x, uint64_t* bits) {
  const int64_t pixels = s.batch * s.pixels, full = s.channels / 64, rest = s.channels % 64;
#pragma omp for schedule(static) nowait
  for (int64_t p0 = 0; p0 < pixels; p0 += 64) {
    const int64_t n = min(64, pixels - p0);
    const typename T::Bits* from = x + p0 * s.channels;
    uint64_t* to = bits + p0 * (full + (rest != 0));
    if (full == 0) {
      pack_narrow_pixels(scanner, from, n, s.channels, to);
      continue;
    }
    for (int64_t p = 0; p < n; p++) {
      for (int64_t w = 0; w < full; w++, from += 64) *to++ = scanner.scan(from, 64);
      if (rest != 0) *to++ = scanner.scan(from, rest), from += rest;
    }
  }
}

// Reads a run of each plane, then turns them into words. The hardware does not follow a jump from plane to plane.
template <class T>
void pack_planar(NonzeroScanner<T>& scanner, const SfScan& s, const typename T::Bits* x, uint64_t* bits) {
  constexpr int64_t kRun = 8 * 64, kLine = 64 / sizeof(typename T::Bits);
  constexpr int64_t kAhead = 2;  // planes
  const int64_t words = ceil_div(s.channels, 64), runs = ceil_div(s.pixels, kRun);
#pragma omp for schedule(static) nowait
  for (int64_t unit = 0; unit < s.batch * words * runs; unit++) {
    const int64_t p0 = unit % runs * kRun, w = unit / runs % words, n = unit / runs / words;
    const int64_t pixels = min(kRun, s.pixels - p0), channels = min(64, s.channels - 64 * w);
    const typename T::Bits* plane = x + (n * s.channels + 64 * w) * s.pixels + p0;
    uint64_t masks[kRun / 64][64];
    for (int64_t c = 0; c < channels; c++, plane += s.pixels) {
      for (int64_t p = 0; p < pixels; p += 64) {
        for (int64_t i = 0; i < 64; i += kLine) __builtin_prefetch(plane + kAhead * s.pixels + p + i);
        masks[p / 64][c] = scanner.scan(plane + p, min(64, pixels - p));
      }
    }
    uint64_t* out = bits + (n * s.pixels + p0) * words + w;
    for (int64_t p = 0; p < pixels; p += 64) {
      uint64_t(&m)[64] = masks[p / 64];
      for (int64_t c = channels; c < 64; c++) m[c] = 0;
      transpose_bits(m);
      for (int64_t i = 0; i < min(64, pixels - p); i++, out += words) *out = m[i];
    }
  }
}

// counts: number of events, of words with an event, and 1 if every event is exactly one.
template <class T>
void prescan(const SfScan& s, const void* x, uint64_t* bits, uint32_t* row_counts, int64_t* counts, int threads) {
  const auto* elements = static_cast<const typename T::Bits*>(x);
  const int64_t words = ceil_div(s.channels, 64), row_words = s.row_pixels * words;
  const int64_t rows = s.row_pixels ? s.batch * s.pixels / s.row_pixels : 0;
  int64_t events = 0, occupied = 0, graded = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : events, occupied, graded)
  {
    NonzeroScanner<T> scanner;
    if (s.channels_last) {
      pack_channels_last(scanner, s, elements, bits);
    } else {
      pack_planar(scanner, s, elements, bits);
    }
    graded += !scanner.only_ones();
#pragma omp barrier
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
      uint32_t count = 0;
      for (const uint64_t *w = bits + row * row_words, *end = w + row_words; w < end; w++) {
        count += popcount(*w);
        occupied += *w != 0;
      }
      row_counts[row] = count;
      events += count;
    }
  }
  counts[0] = events;
  counts[1] = occupied;
  counts[2] = graded == 0;
}

}  // namespace sparseflow::SF_NAMESPACE
