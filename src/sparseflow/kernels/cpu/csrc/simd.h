// Vectors of one instruction set. Everything above this file is written once in terms of it.
//
// GCC/Clang vector extensions give arithmetic for every target; what they cannot express (bit compression, masks,
// half precision) is specialised here. All names live in a namespace per instruction set, so that the linker can
// never substitute a function compiled for AVX-512 into the portable path.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define SF_INLINE_MEMBER inline __attribute__((always_inline))
#define SF_INLINE static SF_INLINE_MEMBER

#if defined(SF_VBMI)  // AVX-512 of Ice Lake, Zen 4 and later; implies SF_AVX512
#define SF_NAMESPACE avx512vbmi
#define SF_VECTOR_BYTES 64
#elif defined(SF_AVX512)
#define SF_NAMESPACE avx512
#define SF_VECTOR_BYTES 64
#elif defined(SF_AVX2)
#define SF_NAMESPACE avx2
#define SF_VECTOR_BYTES 32
#else
#define SF_NAMESPACE portable
#define SF_VECTOR_BYTES 16
#endif

namespace sparseflow::SF_NAMESPACE {

typedef float VecF32 __attribute__((vector_size(SF_VECTOR_BYTES)));
typedef double VecF64 __attribute__((vector_size(SF_VECTOR_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(SF_VECTOR_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(SF_VECTOR_BYTES)));
typedef int64_t VecI64 __attribute__((vector_size(SF_VECTOR_BYTES)));
typedef uint64_t VecU64 __attribute__((vector_size(SF_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(SF_VECTOR_BYTES)));
// As many 16-bit lanes as VecF32 has lanes.
typedef uint16_t NarrowU16 __attribute__((vector_size(SF_VECTOR_BYTES / 2)));
typedef uint8_t NarrowU8 __attribute__((vector_size(SF_VECTOR_BYTES / 4)));

template <class V>
SF_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
SF_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class To, class From>
SF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

SF_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
SF_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
SF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SF_INLINE int popcount(uint64_t bits) { return __builtin_popcountll(bits); }
SF_INLINE int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }
SF_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// a * b + c, fused where the instruction set has it.
SF_INLINE VecF32 multiply_add(VecF32 a, VecF32 b, VecF32 c) {
#if defined(SF_AVX512)
  return (VecF32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(SF_AVX2)
  return (VecF32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SF_INLINE VecF64 multiply_add(VecF64 a, VecF64 b, VecF64 c) {
#if defined(SF_AVX512)
  return (VecF64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(SF_AVX2)
  return (VecF64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// ---- lane masks ------------------------------------------------------------------------------------------------

constexpr int kFloats = SF_VECTOR_BYTES / 4;  // lanes of VecF32

#if defined(SF_AVX512)
SF_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << min(max(n, 0), kFloats)) - 1); }
#elif defined(SF_AVX2)
// All bits set in the first n lanes.
SF_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Lanes where a > b.
#if defined(SF_AVX512)
using LaneMask = __mmask16;
SF_INLINE LaneMask greater(VecF32 a, VecF32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
#else
using LaneMask = VecI32;
SF_INLINE LaneMask greater(VecF32 a, VecF32 b) { return (VecI32)(a > b); }
#endif

// Bit i: lane i is set.
SF_INLINE uint32_t lane_bits(LaneMask mask) {
#if defined(SF_AVX512)
  return mask;
#elif defined(SF_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kFloats; i++) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

// The first n lanes at p, zeros in the others; touches no memory behind them. All lanes where n is kFloats or more, none
// where it is 0 or less.
SF_INLINE VecF32 load_first(const float* p, int64_t n) {
#if defined(SF_AVX512)
  return (VecF32)_mm512_maskz_loadu_ps(first_lanes(n), p);
#elif defined(SF_AVX2)
  return (VecF32)_mm256_maskload_ps(p, first_lanes(n));
#else
  if (n >= kFloats) return load<VecF32>(p);
  VecF32 v{};
  for (int i = 0; i < kFloats; i++) {
    if (i < n) v[i] = p[i];
  }
  return v;
#endif
}

SF_INLINE void store_first(float* p, VecF32 v, int64_t n) {
#if defined(SF_AVX512)
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
#elif defined(SF_AVX2)
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#else
  if (n >= kFloats) return store(p, v);
  for (int i = 0; i < kFloats; i++) {
    if (i < n) p[i] = v[i];
  }
#endif
}

// The larger of each lane; a NaN in either wins, and of equal values `a`, as in PyTorch's max pooling.
SF_INLINE VecF32 larger(VecF32 a, VecF32 b) {
  const VecI32 take = (VecI32)(b > a) | (VecI32)(b != b);
  return take ? b : a;
}

// a in the lanes that are set, b in the others.
SF_INLINE VecF32 select(LaneMask mask, VecF32 a, VecF32 b) {
#if defined(SF_AVX512)
  return (VecF32)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)a);
#else
  return mask ? a : b;
#endif
}

// 1.0 in the lanes that are set, 0.0 in the others.
SF_INLINE VecF32 ones_where(LaneMask mask) {
#if defined(SF_AVX512)
  return (VecF32)_mm512_maskz_mov_ps(mask, _mm512_set1_ps(1.0f));
#else
  return (VecF32)(mask & 0x3f800000);
#endif
}

// The lanes whose bit is set.
SF_INLINE LaneMask lanes_of(uint32_t bits) {
#if defined(SF_AVX512)
  return (LaneMask)bits;
#else
  VecU32 lane_bit;
  for (int i = 0; i < kFloats; i++) lane_bit[i] = 1u << i;
  return (VecI32)((lane_bit & (VecU32{} + bits)) != 0u);
#endif
}

// ---- 16-bit floats ---------------------------------------------------------------------------------------------

SF_INLINE VecF32 widen_bf16(NarrowU16 v) { return bit_cast<VecF32>(__builtin_convertvector(v, VecU32) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
SF_INLINE NarrowU16 narrow_bf16(VecF32 v) {
  const VecU32 u = bit_cast<VecU32>(v);
  const VecU32 nan = bit_cast<VecU32>((u & 0x7fffffffu) > 0x7f800000u);
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((nan & ((u >> 16) | 0x40u)) | (~nan & rounded), NarrowU16);
}

SF_INLINE VecF32 widen_f16(NarrowU16 v) {
#if defined(SF_AVX512)
  return (VecF32)_mm512_cvtph_ps(bit_cast<__m256i>(v));
#elif defined(SF_AVX2)
  return (VecF32)_mm256_cvtph_ps(bit_cast<__m128i>(v));
#else
  const VecU32 h = __builtin_convertvector(v, VecU32);
  const VecU32 magnitude = (h & 0x7fffu) << 13;
  const VecU32 subnormal = bit_cast<VecU32>(magnitude < (0x400u << 13));
  const VecU32 infinite = bit_cast<VecU32>(magnitude >= (0x7c00u << 13));
  // 2^-14 * (1 + m) - 2^-14 is the subnormal value without touching a float32 denormal (flush-to-zero safe).
  const VecF32 small = bit_cast<VecF32>(magnitude + 0x38800000u) - bit_cast<VecF32>((h & 0u) + 0x38800000u);
  const VecU32 normal = magnitude + (112u << 23) + (infinite & (112u << 23));
  return bit_cast<VecF32>((subnormal & bit_cast<VecU32>(small)) | (~subnormal & normal) | ((h & 0x8000u) << 16));
#endif
}

// Round to nearest even.
SF_INLINE NarrowU16 narrow_f16(VecF32 v) {
#if defined(SF_AVX512)
  return bit_cast<NarrowU16>(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(SF_AVX2)
  return bit_cast<NarrowU16>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecU32 u = bit_cast<VecU32>(v);
  const VecU32 a = u & 0x7fffffffu;
  const VecU32 nan = bit_cast<VecU32>(a > 0x7f800000u);
  const VecU32 overflow = bit_cast<VecU32>(a >= (143u << 23));
  const VecU32 subnormal = bit_cast<VecU32>(a < (113u << 23));
  // Adding 0.5 aligns the subnormal's bits at the bottom of the mantissa and rounds them to nearest even.
  const VecF32 half = bit_cast<VecF32>((u & 0u) + (126u << 23));
  const VecU32 small = bit_cast<VecU32>(bit_cast<VecF32>(a) + half) - (126u << 23);
  const VecU32 normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const VecU32 finite = (subnormal & small) | (~subnormal & normal);
  const VecU32 special = 0x7c00u | (nan & 0x200u);
  return __builtin_convertvector((overflow & special) | (~overflow & finite) | ((u >> 16) & 0x8000u), NarrowU16);
#endif
}

// ---- element types ---------------------------------------------------------------------------------------------

// Element: as stored in tensors and weight rows. Acc: what sums are kept in. Bits: the integer of Element's size.
struct Float32 {
  using Element = float;
  using Acc = float;
  using Vec = VecF32;
  using Bits = uint32_t;
  static constexpr Bits kOne = 0x3f800000u;
  SF_INLINE Vec widen(const Element* p) { return load<Vec>(p); }
  SF_INLINE void narrow(Element* p, Vec v) { store(p, v); }
};

struct Float64 {
  using Element = double;
  using Acc = double;
  using Vec = VecF64;
  using Bits = uint64_t;
  static constexpr Bits kOne = 0x3ff0000000000000u;
  SF_INLINE Vec widen(const Element* p) { return load<Vec>(p); }
  SF_INLINE void narrow(Element* p, Vec v) { store(p, v); }
};

struct BFloat16 {
  using Element = uint16_t;
  using Acc = float;
  using Vec = VecF32;
  using Bits = uint16_t;
  static constexpr Bits kOne = 0x3f80u;
  SF_INLINE Vec widen(const Element* p) { return widen_bf16(load<NarrowU16>(p)); }
  SF_INLINE void narrow(Element* p, Vec v) { store(p, narrow_bf16(v)); }
};

struct Float16 {
  using Element = uint16_t;
  using Acc = float;
  using Vec = VecF32;
  using Bits = uint16_t;
  static constexpr Bits kOne = 0x3c00u;
  SF_INLINE Vec widen(const Element* p) { return widen_f16(load<NarrowU16>(p)); }
  SF_INLINE void narrow(Element* p, Vec v) { store(p, narrow_f16(v)); }
};

template <class T>
constexpr int kLanes = sizeof(typename T::Vec) / sizeof(typename T::Acc);

template <class T>
constexpr bool kWide = sizeof(typename T::Element) == sizeof(typename T::Acc);

template <class T>
SF_INLINE typename T::Vec splat(typename T::Acc value) {
  return typename T::Vec{} + value;
}

template <class T>
SF_INLINE typename T::Acc to_acc(typename T::Element value) {
  if constexpr (kWide<T>) {
    return value;
  } else {
    typename T::Element lanes[kLanes<T>] = {value};
    return T::widen(lanes)[0];
  }
}

// bfloat16 weight rows are packed with channels i and 16 + i of every 32 next to each other: a register of them splits
// into two registers of floats with a shift and a mask, half the work of widening neighbours.
constexpr int kInterleave = 16;

template <class T>
constexpr bool kInterleaved = false;
template <>
inline constexpr bool kInterleaved<BFloat16> = true;

// Place of a channel within a packed weight row.
template <class T>
SF_INLINE int64_t packed_place(int64_t channel) {
  if (!kInterleaved<T>) return channel;
  return channel / (2 * kInterleave) * (2 * kInterleave) + channel % kInterleave * 2 + channel / kInterleave % 2;
}

// N vectors of a packed weight row; N * kLanes is a multiple of 32 for an interleaved type.
template <class T, int N>
SF_INLINE void load_weights(const typename T::Element* row, typename T::Vec (&weights)[N]) {
  constexpr int L = kLanes<T>;
  if constexpr (kInterleaved<T>) {
    constexpr int kHalf = kInterleave / L;
    static_assert(N % (2 * kHalf) == 0, "interleaved rows come in groups of 32 channels");
#pragma GCC unroll 16
    for (int v = 0; v < N / 2; v++) {
      const VecU32 pair = load<VecU32>(row + v * 2 * L);
      const int even = v / kHalf * 2 * kHalf + v % kHalf;
      weights[even] = bit_cast<VecF32>(pair << 16);
      weights[even + kHalf] = bit_cast<VecF32>(pair & 0xffff0000u);
    }
  } else {
#pragma GCC unroll 32
    for (int v = 0; v < N; v++) weights[v] = T::widen(row + v * L);
  }
}

template <class T>
SF_INLINE void narrow_partial(typename T::Element* p, typename T::Vec v, int64_t n) {
  typename T::Element lanes[kLanes<T>];
  T::narrow(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(typename T::Element));
}

// ---- transposition ---------------------------------------------------------------------------------------------

#if defined(__clang__)
#define SF_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SF_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

#if SF_VECTOR_BYTES == 64
SF_INLINE VecF32 interleave_low(VecF32 a, VecF32 b) {
  return SF_SHUFFLE(VecI32, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
SF_INLINE VecF32 interleave_high(VecF32 a, VecF32 b) {
  return SF_SHUFFLE(VecI32, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
template <class V>
SF_INLINE V interleave_low64(V a, V b) {
  return SF_SHUFFLE(VecI64, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
template <class V>
SF_INLINE V interleave_high64(V a, V b) {
  return SF_SHUFFLE(VecI64, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif SF_VECTOR_BYTES == 32
SF_INLINE VecF32 interleave_low(VecF32 a, VecF32 b) { return SF_SHUFFLE(VecI32, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
SF_INLINE VecF32 interleave_high(VecF32 a, VecF32 b) { return SF_SHUFFLE(VecI32, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
template <class V>
SF_INLINE V interleave_low64(V a, V b) {
  return SF_SHUFFLE(VecI64, a, b, 0, 4, 1, 5);
}
template <class V>
SF_INLINE V interleave_high64(V a, V b) {
  return SF_SHUFFLE(VecI64, a, b, 2, 6, 3, 7);
}
#else
SF_INLINE VecF32 interleave_low(VecF32 a, VecF32 b) { return SF_SHUFFLE(VecI32, a, b, 0, 4, 1, 5); }
SF_INLINE VecF32 interleave_high(VecF32 a, VecF32 b) { return SF_SHUFFLE(VecI32, a, b, 2, 6, 3, 7); }
template <class V>
SF_INLINE V interleave_low64(V a, V b) {
  return SF_SHUFFLE(VecI64, a, b, 0, 2);
}
template <class V>
SF_INLINE V interleave_high64(V a, V b) {
  return SF_SHUFFLE(VecI64, a, b, 1, 3);
}
#endif
SF_INLINE VecF64 interleave_low(VecF64 a, VecF64 b) { return interleave_low64(a, b); }
SF_INLINE VecF64 interleave_high(VecF64 a, VecF64 b) { return interleave_high64(a, b); }

// rows[i][j] becomes rows[j][i]: log2(N) rounds that each interleave row i with row i + N/2.
template <int N, class V>
SF_INLINE void transpose(V (&rows)[N]) {
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
    V next[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; i++) {
      next[2 * i] = interleave_low(rows[i], rows[i + N / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + N / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) rows[i] = next[i];
  }
}

}  // namespace sparseflow::SF_NAMESPACE
