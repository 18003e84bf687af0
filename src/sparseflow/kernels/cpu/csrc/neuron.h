// What follows the sums of a fused block: scale, shift, residual, the maximum over windows, and the neuron. All work on a
// run of neighbouring pixels of one image, 16 channels at a time, and keep the constants of those channels in registers.
//
// Every operation is rounded on its own, in the order the frameworks have it: fusing or reordering flips spikes.
#pragma once

#include "abi.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

constexpr int kUnit = 16;                    // channels of one step of a pass; two bytes of packed spikes
constexpr int kVectors = kUnit / kFloats;    // vectors they fill

// `pixels` neighbours (behind the pooling) of image (t, n), channels first_channel .. first_channel + channels.
struct Run {
  int64_t t, n, pixel, pixels;
  int64_t first_channel, channels;  // the first is a multiple of kUnit
};

struct Unit {
  VecF32 part[kVectors];
};

SF_INLINE Unit load_unit(const float* p) {
  Unit u;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) u.part[i] = load<VecF32>(p + i * kFloats);
  return u;
}

SF_INLINE void store_unit(float* p, const Unit& u) {
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) store(p + i * kFloats, u.part[i]);
}

// The first n channels of a unit; kTail says that n may be less than all of them.
template <bool kTail>
SF_INLINE Unit load_channels(const float* p, int64_t n) {
  if (!kTail) return load_unit(p);
  Unit u;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) u.part[i] = load_first(p + i * kFloats, n - i * kFloats);
  return u;
}

template <bool kTail>
SF_INLINE void store_channels(float* p, const Unit& u, int64_t n) {
  if (!kTail) return store_unit(p, u);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) store_first(p + i * kFloats, u.part[i], n - i * kFloats);
}

SF_INLINE Unit splat_unit(float value) {
  Unit u;
  for (VecF32& part : u.part) part = VecF32{} + value;
  return u;
}

// Where the spikes of a unit lie within packed words.
SF_INLINE int64_t spike_byte(const SfBlock& b, int64_t image_pixel, int64_t channel) {
  return image_pixel * ceil_div(b.channels, 64) * 8 + channel / 8;
}

// ---- scale, shift, residual --------------------------------------------------------------------------------------

enum Residual { kNoResidual, kFloatResidual, kBitResidual, kCountResidual };

SF_INLINE Residual residual_kind(const SfBlock& b) {
  if (b.residual != nullptr) return kFloatResidual;
  if (b.residual_counts != nullptr) return kCountResidual;
  return b.residual_bits != nullptr ? kBitResidual : kNoResidual;
}

template <Residual kKind, bool kTail>
SF_INLINE Unit residual_of(const SfBlock& b, int64_t image_pixel, int64_t channel, int64_t n) {
  Unit u;
  if constexpr (kKind == kFloatResidual) return load_channels<kTail>(b.residual + image_pixel * b.channels + channel, n);
  if constexpr (kKind == kBitResidual) {
    uint16_t spikes;
    __builtin_memcpy(&spikes, reinterpret_cast<const char*>(b.residual_bits) + spike_byte(b, image_pixel, channel), 2);
    for (int i = 0; i < kVectors; i++) u.part[i] = ones_where(spikes >> (i * kFloats) & ((1u << kFloats) - 1));
  }
  if constexpr (kKind == kCountResidual) {
    uint8_t lanes[kUnit] = {};
    __builtin_memcpy(lanes, b.residual_counts + image_pixel * b.channels + channel, kTail ? n : kUnit);
    for (int i = 0; i < kVectors; i++) {
      const VecI32 wide = __builtin_convertvector(load<NarrowU8>(lanes + i * kFloats), VecI32);
      u.part[i] = __builtin_convertvector(wide, VecF32);
    }
  }
  return u;
}

// Scale and shift of one unit of channels, and the residual that is added to them.
template <Residual kKind, bool kTail>
struct Affine {
  const SfBlock& b;
  const int64_t channel, n;
  const bool scaled, shifted;
  const Unit scale, shift;

  Affine(const SfBlock& b, int64_t channel, int64_t n)
      : b(b),
        channel(channel),
        n(n),
        scaled(b.scale != nullptr),
        shifted(b.shift != nullptr),
        scale(scaled ? load_unit(b.scale + channel) : Unit{}),
        shift(shifted ? load_unit(b.shift + channel) : Unit{}) {}

  // Of the sums at x, which belong to a pixel of the map.
  SF_INLINE_MEMBER Unit of(const float* x, int64_t image_pixel) const {
    Unit u = load_channels<kTail>(x, n), residual;
    if constexpr (kKind != kNoResidual) residual = residual_of<kKind, kTail>(b, image_pixel, channel, n);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      if (scaled) u.part[i] = u.part[i] * scale.part[i];
      if (shifted) u.part[i] = u.part[i] + shift.part[i];
      if constexpr (kKind != kNoResidual) u.part[i] = u.part[i] + residual.part[i];
    }
    return u;
  }
};

// Where the sums of a run of pixels lie, or those of a run of windows: the channels of a pixel are neighbours, pixels
// lie `pixel` apart, rows and planes of a window `row` and `plane`. Distances in floats.
struct Sums {
  const float* x;
  int64_t pixel, row, plane;
  int64_t image_pixel;  // the first pixel's number in the maps of all images
};

template <Residual kKind, bool kTail>
void affine_unit(const SfBlock& b, const Run& run, int64_t c, int64_t n, const Sums& sums, float* to, int64_t to_step) {
  const Affine<kKind, kTail> affine(b, run.first_channel + c, n);
  const float* x = sums.x + c;
  for (int64_t p = 0; p < run.pixels; p++, x += sums.pixel, to += to_step) {
    store_channels<kTail>(to, affine.of(x, sums.image_pixel + p), n);
  }
}

// The same, and the maximum over every window. `to` may be where the first row of the sums lies.
template <Residual kKind, bool kTail>
void pool_unit(const SfBlock& b, const Run& run, int64_t c, int64_t n, const Sums& sums, float* to, int64_t to_step) {
  const Affine<kKind, kTail> affine(b, run.first_channel + c, n);
  const int64_t depth = b.window[0], height = b.window[1], width = b.window[2];
  for (int64_t p = 0; p < run.pixels; p++, to += to_step) {
    Unit most = splat_unit(-__builtin_inff());
    for (int64_t d = 0; d < depth; d++) {
      for (int64_t h = 0; h < height; h++) {
        const float* x = sums.x + c + d * sums.plane + h * sums.row + p * width * sums.pixel;
        const int64_t image_pixel = sums.image_pixel + (d * b.map[1] + h) * b.map[2] + p * width;
        for (int64_t w = 0; w < width; w++, x += sums.pixel) {
          const Unit u = affine.of(x, image_pixel + w);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; i++) most.part[i] = larger(most.part[i], u.part[i]);
        }
      }
    }
    store_channels<kTail>(to, most, n);
  }
}

SF_INLINE bool pools(const SfBlock& b) { return b.window[0] * b.window[1] * b.window[2] > 1; }

template <Residual kKind, bool kTail>
SF_INLINE void currents_unit(const SfBlock& b, const Run& run, int64_t c, int64_t n, const Sums& sums, float* to,
                             int64_t to_step) {
  if (pools(b)) return pool_unit<kKind, kTail>(b, run, c, n, sums, to, to_step);
  affine_unit<kKind, kTail>(b, run, c, n, sums, to, to_step);
}

template <Residual kKind>
void currents_channels(const SfBlock& b, const Run& run, const Sums& sums, float* to, int64_t to_step) {
  int64_t c = 0;
  for (; c + kUnit <= run.channels; c += kUnit) currents_unit<kKind, false>(b, run, c, kUnit, sums, to + c, to_step);
  if (c < run.channels) currents_unit<kKind, true>(b, run, c, run.channels - c, sums, to + c, to_step);
}

// What the neuron gets of the run's channels, to [pixels][to_step]; `to` may be sums.x with the same step.
SF_INLINE void currents(const SfBlock& b, const Run& run, const Sums& sums, float* to, int64_t to_step) {
  switch (residual_kind(b)) {
    case kNoResidual: return currents_channels<kNoResidual>(b, run, sums, to, to_step);
    case kFloatResidual: return currents_channels<kFloatResidual>(b, run, sums, to, to_step);
    case kBitResidual: return currents_channels<kBitResidual>(b, run, sums, to, to_step);
    case kCountResidual: return currents_channels<kCountResidual>(b, run, sums, to, to_step);
  }
}

// ---- neurons -----------------------------------------------------------------------------------------------------

// The constants of one unit of channels.
struct Constants {
  Unit fires_above, threshold, decay, gains[3], synapse_decay;
  VecF32 reset_value, rest;

  Constants(const SfNeuron& k, int64_t channel)
      : fires_above(load_unit(k.fires_above + channel)),
        threshold(load_unit(k.threshold + channel)),
        decay(load_unit(k.decay + channel)),
        gains{load_unit(k.gains[0] + channel), load_unit(k.gains[1] + channel), load_unit(k.gains[2] + channel)},
        synapse_decay(load_unit(k.synapse_decay + channel)),
        reset_value(VecF32{} + k.reset_value),
        rest(VecF32{} + k.rest) {}
};

template <int kCharge>
SF_INLINE VecF32 charged(const Constants& k, int i, VecF32 v, VecF32& syn, VecF32 x) {
  const VecF32 d = k.decay.part[i];
  if constexpr (kCharge == SF_INTEGRATE) return v + x;
  if constexpr (kCharge == SF_LEAK_INPUT) return v + (x - (v - k.rest)) / d;
  if constexpr (kCharge == SF_LEAK) return (v - (v - k.rest) / d) + x;
  if constexpr (kCharge == SF_LEAK_INPUT_RATE) return v + (x - (v - k.rest)) * d;
  if constexpr (kCharge == SF_LEAK_RATE) return (v - (v - k.rest) * d) + x;
  if constexpr (kCharge == SF_DECAY) return d * v + x;
  if constexpr (kCharge == SF_DECAY_GAIN) {
    return ((x * k.gains[0].part[i]) * k.gains[1].part[i]) * k.gains[2].part[i] + d * v;
  }
  if constexpr (kCharge == SF_SYNAPTIC) {
    syn = k.synapse_decay.part[i] * syn + x;
    return d * v + syn;
  }
}

// One time step; returns a lane mask of the spikes.
template <int kCharge, int kReset, int kTiming>
SF_INLINE VecI32 step(const Constants& k, int i, VecF32& v, VecF32& syn, VecF32 x) {
  const VecF32 one = VecF32{} + 1.0f;
  const auto as_number = [&](VecI32 mask) { return (VecF32)(mask & (VecI32)one); };
  VecF32 late{};
  if constexpr (kTiming != SF_SAME_STEP && kReset != SF_NONE) {
    late = as_number((VecI32)(v > k.fires_above.part[i]));
    if constexpr (kReset == SF_HARD && kCharge == SF_DECAY) v = (one - late) * v;
  }
  VecF32 h = charged<kCharge>(k, i, v, syn, x);
  if constexpr (kTiming != SF_SAME_STEP) {
    if constexpr (kReset == SF_SOFT) h = h - late * k.threshold.part[i];
    if constexpr (kReset == SF_HARD && kCharge != SF_DECAY) h = h - late * h;
  }
  const VecI32 spikes = (VecI32)(h > k.fires_above.part[i]);
  const VecF32 s = as_number(spikes);
  if constexpr (kReset == SF_NONE || kTiming == SF_NEXT_STEP) {
    v = h;
  } else if constexpr (kReset == SF_SOFT) {
    v = h - (s - late) * k.threshold.part[i];
  } else if constexpr (kTiming == SF_SAME_STEP) {
    v = s * k.reset_value + (one - s) * h;
  } else {
    v = h - (s - late) * h;
  }
  return spikes;
}

template <int kCharge, int kReset, int kTiming, bool kTail>
uint32_t fire_unit(const SfBlock& b, const Run& run, int64_t c, int64_t n, const float* x, int64_t x_step) {
  const int64_t channel = run.first_channel + c;
  const Constants k(b.neuron, channel);
  const bool fresh = b.fresh && run.t == 0;
  const Unit start = splat_unit(b.neuron.start), silent = splat_unit(0.0f);
  const uint32_t valid = uint32_t(low_bits(n));
  int64_t at = (run.n * b.pixels + run.pixel) * b.channels + channel;
  int64_t image_pixel = (run.t * b.batch + run.n) * b.pixels + run.pixel;
  uint32_t fired = 0;
  for (int64_t p = 0; p < run.pixels; p++, x += x_step, at += b.channels, image_pixel++) {
    Unit in = load_channels<kTail>(x, n);
    Unit v = fresh ? start : load_channels<kTail>(b.v + at, n), syn = silent;
    if constexpr (kCharge == SF_SYNAPTIC) syn = fresh ? silent : load_channels<kTail>(b.syn + at, n);
    uint32_t spikes = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      spikes |= lane_bits(step<kCharge, kReset, kTiming>(k, i, v.part[i], syn.part[i], in.part[i])) << (i * kFloats);
    }
    store_channels<kTail>(b.v + at, v, n);
    if constexpr (kCharge == SF_SYNAPTIC) store_channels<kTail>(b.syn + at, syn, n);
    if (b.v_seq != nullptr) store_channels<kTail>(b.v_seq + image_pixel * b.channels + channel, v, n);
    if (kTail) spikes &= valid;
    const uint16_t half = uint16_t(spikes);
    __builtin_memcpy(reinterpret_cast<char*>(b.bits) + spike_byte(b, image_pixel, channel), &half, 2);
    fired += uint32_t(popcount(half));
  }
  return fired;
}

// The bytes of the last word that lie behind the last unit of channels.
SF_INLINE void clear_padding(const SfBlock& b, const Run& run) {
  const int64_t used = ceil_div(b.channels, kUnit) * 2, bytes = ceil_div(b.channels, 64) * 8;
  if (used == bytes || run.first_channel + run.channels != b.channels) return;
  char* pixel = reinterpret_cast<char*>(b.bits) + ((run.t * b.batch + run.n) * b.pixels + run.pixel) * bytes;
  for (int64_t p = 0; p < run.pixels; p++, pixel += bytes) __builtin_memset(pixel + used, 0, bytes - used);
}

template <int kCharge, int kReset, int kTiming>
uint32_t fire(const SfBlock& b, const Run& run, const float* x, int64_t x_step) {
  uint32_t fired = 0;
  int64_t c = 0;
  for (; c + kUnit <= run.channels; c += kUnit) {
    fired += fire_unit<kCharge, kReset, kTiming, false>(b, run, c, kUnit, x + c, x_step);
  }
  if (c < run.channels) {
    fired += fire_unit<kCharge, kReset, kTiming, true>(b, run, c, run.channels - c, x + c, x_step);
  }
  clear_padding(b, run);
  return fired;
}

// Runs the neuron on x [pixels][x_step]; returns how many spikes there were.
using Fire = uint32_t (*)(const SfBlock&, const Run&, const float* x, int64_t x_step);

template <int kCharge>
Fire find_fire_of(int32_t reset, int32_t timing) {
  if (reset == SF_NONE) return fire<kCharge, SF_NONE, SF_NEXT_STEP>;
  if (timing == SF_SAME_STEP) return reset == SF_HARD ? fire<kCharge, SF_HARD, SF_SAME_STEP> : fire<kCharge, SF_SOFT, SF_SAME_STEP>;
  if (timing == SF_NEXT_STEP) return reset == SF_HARD ? fire<kCharge, SF_HARD, SF_NEXT_STEP> : fire<kCharge, SF_SOFT, SF_NEXT_STEP>;
  return reset == SF_HARD ? fire<kCharge, SF_HARD, SF_BOTH> : fire<kCharge, SF_SOFT, SF_BOTH>;
}

// Null for a block without a neuron.
SF_INLINE Fire find_fire(const SfNeuron& k) {
  switch (k.charge) {
    case SF_INTEGRATE: return find_fire_of<SF_INTEGRATE>(k.reset, k.timing);
    case SF_LEAK_INPUT: return find_fire_of<SF_LEAK_INPUT>(k.reset, k.timing);
    case SF_LEAK: return find_fire_of<SF_LEAK>(k.reset, k.timing);
    case SF_LEAK_INPUT_RATE: return find_fire_of<SF_LEAK_INPUT_RATE>(k.reset, k.timing);
    case SF_LEAK_RATE: return find_fire_of<SF_LEAK_RATE>(k.reset, k.timing);
    case SF_DECAY: return find_fire_of<SF_DECAY>(k.reset, k.timing);
    case SF_DECAY_GAIN: return find_fire_of<SF_DECAY_GAIN>(k.reset, k.timing);
    case SF_SYNAPTIC: return find_fire_of<SF_SYNAPTIC>(k.reset, k.timing);
  }
  return nullptr;
}

// Runs the neuron on x [pixels][x_step] and counts its spikes.
SF_INLINE void fire_run(const SfBlock& b, Fire fire, const Run& run, const float* x, int64_t x_step) {
  const uint32_t fired = fire(b, run, x, x_step);
  const int64_t row = ((run.t * b.batch + run.n) * b.pixels + run.pixel) / b.row_pixels;
  __atomic_fetch_add(b.row_counts + row, fired, __ATOMIC_RELAXED);
}

}  // namespace sparseflow::SF_NAMESPACE
