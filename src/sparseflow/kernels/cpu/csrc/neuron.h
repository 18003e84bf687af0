// What follows the sums of a fused block: scale, shift, residual, the maximum over windows, and the neuron. All work on a
// run of neighbouring pixels of one image, 16 channels at a time: these take all time steps of the run with their membrane
// in registers, and are then done with.
//
// Every operation is rounded on its own, in the order the frameworks have it: fusing or reordering flips spikes.
#pragma once

#include <type_traits>

#include "abi.h"
#include "simd.h"

namespace sparseflow::SF_NAMESPACE {

constexpr int kUnit = 16;                    // channels of one step of a pass; two bytes of packed spikes
constexpr int kVectors = kUnit / kFloats;    // vectors they fill

// `pixels` neighbours of one row (behind the pooling) of image n, at time steps t .. t + steps, and their channels
// first_channel .. first_channel + channels.
struct Run {
  int64_t t, steps, n, pixel, pixels;
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

// Whether a masked load costs what another one does: then there is one version for all channels, and half the code.
constexpr bool kFreeMasks = SF_VECTOR_BYTES == 64;

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

SF_INLINE VecF32 splat_float(float value) { return value - VecF32{}; }  // the sum would lose the sign of -0

SF_INLINE Unit splat_unit(float value) {
  Unit u;
  for (VecF32& part : u.part) part = splat_float(value);
  return u;
}

// ---- scale, shift, residual --------------------------------------------------------------------------------------

SF_INLINE Unit added(Unit a, const Unit& b) {
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) a.part[i] = a.part[i] + b.part[i];
  return a;
}

enum Residual { kNoResidual, kFloatResidual, kBitResidual, kCountResidual };

SF_INLINE Residual residual_kind(const SfBlock& b) {
  if (b.residual != nullptr) return kFloatResidual;
  if (b.residual_counts != nullptr) return kCountResidual;
  return b.residual_bits != nullptr ? kBitResidual : kNoResidual;
}

__attribute__((noinline)) inline Unit counts_to_unit(const uint8_t* counts, int64_t n) {
  uint8_t lanes[kUnit] = {};
  __builtin_memcpy(lanes, counts, n);
  Unit u;
  for (int i = 0; i < kVectors; i++) {
    const VecI32 wide = __builtin_convertvector(load<NarrowU8>(lanes + i * kFloats), VecI32);
    u.part[i] = __builtin_convertvector(wide, VecF32);
  }
  return u;
}

// x = sums * scale + shift + residual for one unit of channels, n of which there are. Where there is no scale or shift, 1
// and -0 change no value.
template <bool kTail>
class Affine {
 public:
  SF_INLINE_MEMBER Affine(const SfBlock& b, int64_t channel, int64_t n)
      : kind_(residual_kind(b)),
        channel_(channel),
        n_(n),
        scale_(b.scale != nullptr ? load_unit(b.scale + channel) : splat_unit(1.0f)),
        shift_(b.shift != nullptr ? load_unit(b.shift + channel) : splat_unit(-0.0f)),
        floats_(b.residual),
        bits_(reinterpret_cast<const char*>(b.residual_bits)),
        counts_(b.residual_counts),
        channels_(b.channels),
        pixel_bytes_(ceil_div(b.channels, 64) * 8) {}

  // Of the sums at x, which belong to a pixel of the map.
  SF_INLINE_MEMBER Unit of(const float* x, int64_t image_pixel) const {
    const Unit u = scaled(x);
    return kind_ == kNoResidual ? u : added(u, residual_of(image_pixel));
  }

  bool has_residual() const { return kind_ != kNoResidual; }

  // Without the residual.
  SF_INLINE_MEMBER Unit scaled(const float* x) const {
    Unit u = load_channels<kTail>(x, n_);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) u.part[i] = u.part[i] * scale_.part[i] + shift_.part[i];
    return u;
  }

  SF_INLINE_MEMBER Unit residual_of(int64_t image_pixel) const {
    if (kind_ == kFloatResidual) return load_channels<kTail>(floats_ + image_pixel * channels_ + channel_, n_);
    if (kind_ == kCountResidual) return counts_to_unit(counts_ + image_pixel * channels_ + channel_, n_);
    uint16_t spikes;
    __builtin_memcpy(&spikes, bits_ + image_pixel * pixel_bytes_ + channel_ / 8, 2);
    Unit u;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) u.part[i] = ones_where(lanes_of(spikes >> (i * kFloats) & ((1u << kFloats) - 1)));
    return u;
  }

 private:
  const Residual kind_;
  const int64_t channel_, n_;
  const Unit scale_, shift_;
  const float* const floats_;
  const char* const bits_;
  const uint8_t* const counts_;
  const int64_t channels_, pixel_bytes_;
};

// Where the sums of a run of pixels lie, or those of a run of windows: the channels of a pixel are neighbours, pixels
// lie `pixel` apart, time steps `step`, rows and planes of a window `row` and `plane`. Distances in floats.
struct Sums {
  const float* x;
  int64_t step, pixel, row, plane;
  int64_t image_pixel;  // the first pixel's number in the maps of all images
};

SF_INLINE bool pools(const SfBlock& b) { return b.window[0] * b.window[1] * b.window[2] > 1; }

SF_INLINE int64_t map_pixels(const SfBlock& b) { return b.map[0] * b.map[1] * b.map[2]; }

// Where currents go, [step][pixel][channel]; distances in floats.
struct Target {
  float* x;
  int64_t step, pixel;
};

template <bool kTail>
void write_unit(const SfBlock& b, const Run& run, int64_t c, int64_t n, const Sums& sums, const Target& to) {
  const Affine<kTail> affine(b, run.first_channel + c, n);
  for (int64_t s = 0; s < run.steps; s++) {
    const float* x = sums.x + s * sums.step + c;
    const int64_t pixel = sums.image_pixel + s * b.batch * map_pixels(b);
    for (int64_t p = 0; p < run.pixels; p++) {
      store_channels<kTail>(to.x + s * to.step + p * to.pixel + c, affine.of(x + p * sums.pixel, pixel + p), n);
    }
  }
}

// The same, and the maximum over every window.
template <bool kTail>
void pool_unit(const SfBlock& b, const Run& run, int64_t c, int64_t n, const Sums& sums, const Target& to) {
  const Affine<kTail> affine(b, run.first_channel + c, n);
  for (int64_t s = 0; s < run.steps; s++) {
    for (int64_t p = 0; p < run.pixels; p++) {
      const float* x = sums.x + s * sums.step + p * b.window[2] * sums.pixel + c;
      const int64_t first = sums.image_pixel + s * b.batch * map_pixels(b) + p * b.window[2];
      Unit most = splat_unit(-__builtin_inff());
      for (int64_t d = 0; d < b.window[0]; d++) {
        for (int64_t h = 0; h < b.window[1]; h++) {
          for (int64_t w = 0; w < b.window[2]; w++) {
            const int64_t pixel = first + (d * b.map[1] + h) * b.map[2] + w;
            const Unit u = affine.of(x + d * sums.plane + h * sums.row + w * sums.pixel, pixel);
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++) most.part[i] = larger(most.part[i], u.part[i]);
          }
        }
      }
      store_channels<kTail>(to.x + s * to.step + p * to.pixel + c, most, n);
    }
  }
}

// What the neuron gets. With pooling, `to` may be where the first row of the sums lies, with the same distances.
SF_INLINE void write_currents(const SfBlock& b, const Run& run, const Sums& sums, const Target& to) {
  const auto full = pools(b) ? pool_unit<false> : write_unit<false>, tail = pools(b) ? pool_unit<true> : write_unit<true>;
  int64_t c = 0;
  for (; c + kUnit <= run.channels; c += kUnit) full(b, run, c, kUnit, sums, to);
  if (c < run.channels) tail(b, run, c, run.channels - c, sums, to);
}

// ---- neurons -----------------------------------------------------------------------------------------------------

// The constants of one unit of channels.
struct Constants {
  Unit fires_above, threshold, decay, gains[3], synapse_decay;
  Unit no_threshold;  // threshold * 0
  VecF32 reset_value, no_reset, rest;

  Constants(const SfNeuron& k, int64_t channel)
      : fires_above(load_unit(k.fires_above + channel)),
        threshold(load_unit(k.threshold + channel)),
        decay(load_unit(k.decay + channel)),
        gains{load_unit(k.gains[0] + channel), load_unit(k.gains[1] + channel), load_unit(k.gains[2] + channel)},
        synapse_decay(load_unit(k.synapse_decay + channel)),
        reset_value(splat_float(k.reset_value)),
        no_reset(splat_float(k.reset_value * 0.0f)),
        rest(splat_float(k.rest)) {
    for (int i = 0; i < kVectors; i++) no_threshold.part[i] = threshold.part[i] * 0.0f;
  }
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

// One time step; bit i of the result: lane i fires.
template <int kCharge, int kReset, int kTiming>
SF_INLINE uint32_t step(const Constants& k, int i, VecF32& v, VecF32& syn, VecF32 x) {
  const VecF32 one = VecF32{} + 1.0f;
  VecF32 late{};
  if constexpr (kTiming != SF_SAME_STEP && kReset != SF_NONE) {
    late = ones_where(greater(v, k.fires_above.part[i]));
    if constexpr (kReset == SF_HARD && kCharge == SF_DECAY) v = (one - late) * v;
  }
  VecF32 h = charged<kCharge>(k, i, v, syn, x);
  if constexpr (kTiming != SF_SAME_STEP) {
    if constexpr (kReset == SF_SOFT) h = h - late * k.threshold.part[i];
    if constexpr (kReset == SF_HARD && kCharge != SF_DECAY) h = h - late * h;
  }
  const LaneMask spikes = greater(h, k.fires_above.part[i]);
  if constexpr (kReset == SF_NONE || kTiming == SF_NEXT_STEP) {
    v = h;
  } else if constexpr (kTiming == SF_SAME_STEP && kReset == SF_SOFT) {  // h - s * threshold
    v = h - select(spikes, k.threshold.part[i], k.no_threshold.part[i]);
  } else if constexpr (kTiming == SF_SAME_STEP) {  // s * reset_value + (1 - s) * h
    v = select(spikes, k.reset_value, k.no_reset) + select(spikes, h * 0.0f, h);
  } else if constexpr (kReset == SF_SOFT) {
    v = h - (ones_where(spikes) - late) * k.threshold.part[i];
  } else {
    v = h - (ones_where(spikes) - late) * h;
  }
  return lane_bits(spikes);
}

constexpr int64_t kStepsAtOnce = 32;  // time steps whose currents are computed before the neuron takes them
// Pixels that do: the operations of a step wait for each other, those of several pixels do not.
constexpr int kTogether = 4 / kVectors;

struct Currents {
  Unit x[kStepsAtOnce][kTogether];
};

// Currents of the pixels `pixel` of a run at its first `steps` time steps, without pooling.
template <bool kTail>
SF_INLINE void compute_currents(const Affine<kTail>& affine, const Sums& sums, int64_t c,
                                const int64_t (&pixel)[kTogether], int64_t steps, int64_t map_step, Currents& currents) {
  const int64_t step = sums.step, first = sums.image_pixel;
  const float* x[kTogether];
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; i++) x[i] = sums.x + c + pixel[i] * sums.pixel;
  for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; i++) currents.x[s][i] = affine.scaled(x[i] + s * step);
  }
  if (!affine.has_residual()) return;
  for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; i++) {
      currents.x[s][i] = added(currents.x[s][i], affine.residual_of(first + s * map_step + pixel[i]));
    }
  }
}

// All steps of one unit of channels, without pooling.
template <int kCharge, int kReset, int kTiming, bool kTail>
void fire_unit(const SfBlock& block, const Run& run, const Sums& sums, int64_t c, int64_t n) {
  const SfBlock b = block;  // a copy: no store can change it
  const int64_t channel = run.first_channel + c, steps = run.steps, channels = b.channels;
  const int64_t image_pixel = (run.t * b.batch + run.n) * b.pixels + run.pixel, step_pixels = b.batch * b.pixels;
  const int64_t pixel_bytes = ceil_div(channels, 64) * 8, state = (run.n * b.pixels + run.pixel) * channels + channel;
  const Constants k(b.neuron, channel);
  const Affine<kTail> affine(b, channel, n);
  const bool fresh = b.fresh && run.t == 0, invariant = sums.step == 0 && !affine.has_residual();
  const Unit start = splat_unit(b.neuron.start), silent = splat_unit(0.0f);
  const auto valid = uint32_t(low_bits(n));
  char* const bits = reinterpret_cast<char*>(b.bits) + image_pixel * pixel_bytes + channel / 8;
  float* const v_seq = b.v_seq == nullptr ? nullptr : b.v_seq + image_pixel * channels + channel;
  Currents currents;
  for (int64_t p = 0; p < run.pixels; p += kTogether) {
    int64_t pixel[kTogether];  // the last one several times where there are fewer
    Unit v[kTogether], syn[kTogether];
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; i++) {
      pixel[i] = min(p + i, run.pixels - 1);
      v[i] = fresh ? start : load_channels<kTail>(b.v + state + pixel[i] * channels, n);
      syn[i] = silent;
      if (kCharge == SF_SYNAPTIC && !fresh) syn[i] = load_channels<kTail>(b.syn + state + pixel[i] * channels, n);
    }
    compute_currents(affine, sums, c, pixel, invariant ? 1 : steps, b.batch * map_pixels(b), currents);
    for (int64_t s = 0; s < steps; s++) {
      const Unit(&x)[kTogether] = currents.x[invariant ? 0 : s];
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; i++) {
        uint32_t spikes = 0;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
          const uint32_t lanes = step<kCharge, kReset, kTiming>(k, j, v[i].part[j], syn[i].part[j], x[i].part[j]);
          spikes |= lanes << (j * kFloats);
        }
        const int64_t at = s * step_pixels + pixel[i];
        const auto half = uint16_t(kTail ? spikes & valid : spikes);
        __builtin_memcpy(bits + at * pixel_bytes, &half, 2);
        if (__builtin_expect(v_seq != nullptr, 0)) store_channels<kTail>(v_seq + at * channels, v[i], n);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; i++) {
      store_channels<kTail>(b.v + state + pixel[i] * channels, v[i], n);
      if (kCharge == SF_SYNAPTIC) store_channels<kTail>(b.syn + state + pixel[i] * channels, syn[i], n);
    }
  }
}

// Set bits of `bytes` bytes, an even number.
SF_INLINE uint32_t count_bits(const char* p, int64_t bytes) {
  uint32_t count = 0;
  for (; bytes >= 8; bytes -= 8, p += 8) count += uint32_t(popcount(load<uint64_t>(p)));
  for (; bytes > 0; bytes -= 2, p += 2) count += uint32_t(popcount(load<uint16_t>(p)));
  return count;
}

// The bytes of the last word that lie behind the last unit of channels.
SF_INLINE void clear_padding(const SfBlock& b, const Run& run) {
  const int64_t used = ceil_div(b.channels, kUnit) * 2, bytes = ceil_div(b.channels, 64) * 8;
  if (used == bytes || run.first_channel + run.channels != b.channels) return;
  for (int64_t t = run.t; t < run.t + run.steps; t++) {
    char* pixel = reinterpret_cast<char*>(b.bits) + ((t * b.batch + run.n) * b.pixels + run.pixel) * bytes;
    for (int64_t p = 0; p < run.pixels; p++, pixel += bytes) __builtin_memset(pixel + used, 0, bytes - used);
  }
}

// Adds a run's spikes to the counts of its rows.
SF_INLINE void count_spikes(const SfBlock& b, const Run& run) {
  const int64_t pixel_bytes = ceil_div(b.channels, 64) * 8, end = run.pixel + run.pixels;
  const int64_t bytes = ceil_div(run.channels, kUnit) * 2;
  for (int64_t t = run.t; t < run.t + run.steps; t++) {
    const int64_t first = (t * b.batch + run.n) * b.pixels;
    for (int64_t p = run.pixel, n; p < end; p += n) {
      n = min(end, (p / b.row_pixels + 1) * b.row_pixels) - p;
      const char* spikes = reinterpret_cast<char*>(b.bits) + (first + p) * pixel_bytes + run.first_channel / 8;
      uint32_t fired = 0;
      if (bytes == pixel_bytes) {
        fired = count_bits(spikes, n * bytes);
      } else {
        for (int64_t i = 0; i < n; i++) fired += count_bits(spikes + i * pixel_bytes, bytes);
      }
      __atomic_fetch_add(b.row_counts + (first + p) / b.row_pixels, fired, __ATOMIC_RELAXED);
    }
  }
}

// At most kStepsAtOnce steps of a run.
template <int kCharge, int kReset, int kTiming>
void fire(const SfBlock& b, const Run& run, const Sums& sums) {
  int64_t c = 0;
  if constexpr (!kFreeMasks) {
    for (; c + kUnit <= run.channels; c += kUnit) fire_unit<kCharge, kReset, kTiming, false>(b, run, sums, c, kUnit);
  }
  for (; c < run.channels; c += kUnit) {
    fire_unit<kCharge, kReset, kTiming, true>(b, run, sums, c, min(kUnit, run.channels - c));
  }
  clear_padding(b, run);
  count_spikes(b, run);
}

// Runs the neuron on sums that are not pooled, and counts its spikes.
using Fire = void (*)(const SfBlock&, const Run&, const Sums&);

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

// Any number of steps.
SF_INLINE void fire_run(const SfBlock& b, Fire fire, const Run& run, const Sums& sums) {
  Run part = run;
  Sums at = sums;
  for (int64_t done = 0; done < run.steps; done += kStepsAtOnce) {
    part.t = run.t + done, part.steps = min(kStepsAtOnce, run.steps - done);
    at.x = sums.x + done * sums.step, at.image_pixel = sums.image_pixel + done * b.batch * map_pixels(b);
    fire(b, part, at);
  }
}

// Everything that follows the sums of one run. `staging` is for the maxima over windows, and may be where the sums lie.
SF_INLINE void finish_run(const SfBlock& b, Fire fire, const Run& run, const Sums& sums, const Target& staging) {
  if (fire == nullptr) {
    const int64_t first = (run.t * b.batch + run.n) * b.pixels + run.pixel;
    return write_currents(b, run, sums, {b.out + first * b.channels + run.first_channel, b.batch * b.pixels * b.channels, b.channels});
  }
  if (!pools(b)) return fire_run(b, fire, run, sums);
  write_currents(b, run, sums, staging);
  SfBlock bare = b;  // what is left to do
  bare.scale = bare.shift = bare.residual = nullptr, bare.residual_bits = nullptr, bare.residual_counts = nullptr;
  fire_run(bare, fire, run, {staging.x, staging.step, staging.pixel, 0, 0, 0});
}

}  // namespace sparseflow::SF_NAMESPACE
