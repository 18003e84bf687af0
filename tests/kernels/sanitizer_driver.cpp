// Runs the engine over odd shapes with buffers of exactly the right size, for the address and undefined-behaviour
// sanitizers, and compares with a plain loop. Exits 0 if every result is right.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "abi.h"

extern "C" {
const char* sf_select(const char*);
void sf_prescan(const SfScan*, const void*, uint64_t*, uint32_t*, int64_t*, int);
int sf_conv(const SfConv*, const void*, const uint64_t*, const uint32_t*, const void*, const int32_t*, const void*, void*,
            int, int);
int sf_linear(const SfLinear*, const void*, const uint64_t*, const uint32_t*, const void*, const int32_t*, const void*,
              void*, int, int);
int sf_block_conv(const SfConv*, const SfBlock*, const uint64_t*, const uint32_t*, const uint8_t*, const float*,
                  const int32_t*, int);
int sf_block_dense(const SfBlock*, const float*, int);
void sf_pack(const void*, const int64_t*, const int64_t*, int64_t, int64_t, int, void*, int);
void sf_poison_workspace(int);
}

namespace {

uint64_t state = 1;

int64_t pick(int64_t low, int64_t high) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + int64_t((state >> 33) % uint64_t(high - low + 1));
}

double real() { return double(pick(-1000, 1000)) / 500.0; }

template <class... Choice>
int64_t one_of(Choice... choices) {
  const int64_t values[] = {int64_t(choices)...};
  return values[pick(0, int64_t(sizeof...(choices)) - 1)];
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Tensors of any of the four types, seen as doubles. Values are multiples of 1/500 rounded to the type.
struct Buffer {
  int type;
  std::vector<unsigned char> bytes;

  Buffer(int type, int64_t n) : type(type), bytes(size_t(n) * (type == SF_F64 ? 8 : type == SF_F32 ? 4 : 2), 0xFF) {}

  void set(int64_t i, double value) {
    const float narrow = float(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    if (type == SF_F64) std::memcpy(&bytes[size_t(i) * 8], &value, 8);
    if (type == SF_F32) std::memcpy(&bytes[size_t(i) * 4], &narrow, 4);
    if (type == SF_BF16) {
      const uint16_t high = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      std::memcpy(&bytes[size_t(i) * 2], &high, 2);
    }
    if (type == SF_F16) {
      const _Float16 half = _Float16(value);
      std::memcpy(&bytes[size_t(i) * 2], &half, 2);
    }
  }

  double get(int64_t i) const {
    double wide;
    float single;
    uint16_t half;
    _Float16 half_float;
    switch (type) {
      case SF_F64: return std::memcpy(&wide, &bytes[size_t(i) * 8], 8), wide;
      case SF_F32: return std::memcpy(&single, &bytes[size_t(i) * 4], 4), single;
      case SF_BF16: return std::memcpy(&half, &bytes[size_t(i) * 2], 2), from_bits(uint32_t(half) << 16);
      default: return std::memcpy(&half_float, &bytes[size_t(i) * 2], 2), double(half_float);
    }
  }
};

void fill_events(Buffer& x, int64_t n, int64_t percent, bool graded) {
  for (int64_t i = 0; i < n; i++) x.set(i, pick(0, 99) < percent ? (graded ? real() : 1.0) : 0.0);
}

bool close(double got, double expected, double magnitude, int type) {
  const double unit = type == SF_F64 ? 1e-14 : type == SF_F32 ? 1e-5 : type == SF_F16 ? 2e-3 : 1e-2;
  return std::fabs(got - expected) <= unit * (magnitude + 1);
}

struct Scanned {
  std::vector<uint64_t> bits;
  std::vector<uint32_t> rows;
  int64_t counts[3];

  Scanned(const SfScan& s, const Buffer& x, int threads)
      : bits(size_t(s.batch * s.pixels * ((s.channels + 63) / 64))), rows(size_t(s.batch * s.pixels / s.row_pixels)) {
    sf_prescan(&s, x.bytes.data(), bits.data(), rows.data(), counts, threads);
  }
};

// A weight of which only the blocks that are not zero are kept, as engine.py packs it.
struct Blocks {
  Buffer values;
  std::vector<int32_t> index;

  // Makes some blocks of `w` zero first.
  Blocks(Buffer& w, int64_t outputs, int64_t inputs, int64_t taps) : values(w.type, 0) {
    const int64_t over = (outputs + 15) / 16, in = (inputs + 15) / 16, percent = one_of(0, 30, 100);
    std::vector<int32_t> starts(1, 0), keys;
    std::vector<double> kept;
    for (int64_t b = 0; b < over * in * taps; b++) {
      const int64_t ob = b / taps / in, ib = b / taps % in, tap = b % taps;
      const bool present = pick(0, 99) < percent;
      index.push_back(present ? int32_t(keys.size()) : -1);
      if (present) keys.push_back(int32_t(ib << 16 | tap));
      for (int64_t i = 0; i < 256; i++) {
        const int64_t o = ob * 16 + i % 16, c = ib * 16 + i / 16, at = (o * inputs + c) * taps + tap;
        const bool inside = o < outputs && c < inputs;
        if (present) kept.push_back(inside ? w.get(at) : 0.0);
        if (!present && inside) w.set(at, 0.0);
      }
      if ((b + 1) % (in * taps) == 0) starts.push_back(int32_t(keys.size()));
    }
    index.insert(index.end(), starts.begin(), starts.end());
    index.insert(index.end(), keys.begin(), keys.end());
    values = Buffer(w.type, int64_t(kept.size()));
    for (size_t i = 0; i < kept.size(); i++) values.set(int64_t(i), kept[i]);
  }
};

bool run_conv() {
  SfConv p{};
  p.type = int32_t(pick(0, 3));
  p.groups = one_of(1, 1, 1, 2, 3, 64, 67);
  const int64_t channels = p.groups > 3 ? 1 : one_of(1, 3, 31, 64, 65, 130);
  const int64_t outputs = p.groups > 3 ? 1 : one_of(1, 16, 33, 100);
  const bool depthwise = p.groups > 1 && channels == 1 && outputs == 1;
  p.batch = pick(1, 2), p.in_channels = p.groups * channels, p.out_channels = p.groups * outputs;
  for (int d = 0; d < 3; d++) {
    p.kernel[d] = pick(1, 3), p.stride[d] = pick(1, 3), p.padding[d] = pick(0, 2), p.dilation[d] = pick(1, 2);
    if (d == 2) p.kernel[d] = one_of(1, 2, 3, 3, 5);
    p.in_size[d] = pick(0, 4) + (p.kernel[d] - 1) * p.dilation[d] + 1;
    if (d == 0) p.kernel[d] = pick(1, 2), p.in_size[d] = pick(1, 2) + p.dilation[d];
    p.out_size[d] = (p.in_size[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1) / p.stride[d] + 1;
  }
  p.block = depthwise ? 64 : p.type == SF_BF16 ? one_of(32, 64) : one_of(16, 32, 64);
  p.width = p.block * one_of(1, 2, 4), p.slab = pick(1, 6), p.tile = one_of(1, 5, 64);
  p.x_channels_last = int32_t(pick(0, 1)), p.out_channels_last = int32_t(pick(0, 1));
  p.split_outputs = int32_t(pick(0, 1));
  const int64_t plane = p.in_size[0] * p.in_size[1] * p.in_size[2];
  const int64_t out_plane = p.out_size[0] * p.out_size[1] * p.out_size[2], taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const bool graded = pick(0, 2) == 0, biased = pick(0, 1) == 0;
  const int threads = int(pick(1, 3));

  Buffer x(p.type, p.batch * p.in_channels * plane), w(p.type, p.out_channels * channels * taps);
  Buffer bias(p.type, p.out_channels), out(p.type, p.batch * p.out_channels * out_plane);
  fill_events(x, p.batch * p.in_channels * plane, one_of(0, 2, 20, 100), graded);
  for (int64_t i = 0; i < p.out_channels * channels * taps; i++) w.set(i, real());
  for (int64_t i = 0; i < p.out_channels; i++) bias.set(i, real());
  const int64_t pack_groups = depthwise ? 1 : p.groups, per_group = p.out_channels / pack_groups;
  const int64_t size[5] = {p.out_channels, channels, p.kernel[0], p.kernel[1], p.kernel[2]};
  const int64_t stride[5] = {channels * taps, taps, size[3] * size[4], size[4], 1};
  Buffer packed(p.type, (per_group + p.block - 1) / p.block * p.block * pack_groups * channels * taps);
  sf_pack(w.bytes.data(), size, stride, pack_groups, p.block, p.type, packed.bytes.data(), threads);
  const SfScan scan{p.batch, p.in_channels, plane, p.in_size[2], p.type, p.x_channels_last};
  const Scanned scanned(scan, x, threads);
  sf_poison_workspace(0xFF);
  const void* shift = biased ? bias.bytes.data() : nullptr;
  if (p.groups == 1 && pick(0, 1)) {
    const Blocks blocks(w, p.out_channels, p.in_channels, taps);
    sf_conv(&p, x.bytes.data(), scanned.bits.data(), scanned.rows.data(), blocks.values.bytes.data(),
            blocks.index.data(), shift, out.bytes.data(), !scanned.counts[2], threads);
  } else {
    sf_conv(&p, x.bytes.data(), scanned.bits.data(), scanned.rows.data(), packed.bytes.data(), nullptr, shift,
            out.bytes.data(), !scanned.counts[2], threads);
  }

  for (int64_t i = 0; i < p.batch * p.out_channels * out_plane; i++) {
    const int64_t n = i / out_plane / p.out_channels, o = i / out_plane % p.out_channels, at = i % out_plane;
    const int64_t ow = at % p.out_size[2], oh = at / p.out_size[2] % p.out_size[1], od = at / p.out_size[2] / p.out_size[1];
    double sum = biased ? bias.get(o) : 0.0, magnitude = 0;
    for (int64_t tap = 0; tap < taps; tap++) {
      const int64_t kw = tap % size[4], kh = tap / size[4] % size[3], kd = tap / size[4] / size[3];
      const int64_t d = od * p.stride[0] - p.padding[0] + kd * p.dilation[0];
      const int64_t h = oh * p.stride[1] - p.padding[1] + kh * p.dilation[1];
      const int64_t v = ow * p.stride[2] - p.padding[2] + kw * p.dilation[2];
      if (d < 0 || h < 0 || v < 0 || d >= p.in_size[0] || h >= p.in_size[1] || v >= p.in_size[2]) continue;
      const int64_t pixel = (d * p.in_size[1] + h) * p.in_size[2] + v;
      for (int64_t c = 0; c < channels; c++) {
        const int64_t channel = o / outputs * channels + c;
        const double value = x.get(p.x_channels_last ? (n * plane + pixel) * p.in_channels + channel
                                                     : (n * p.in_channels + channel) * plane + pixel);
        const double term = value * w.get((o * channels + c) * taps + tap);
        sum += term, magnitude += std::fabs(term);
      }
    }
    const double got = out.get(p.out_channels_last ? (n * out_plane + at) * p.out_channels + o : i);
    if (!close(got, sum, magnitude, p.type)) return std::printf("conv: type %d groups %ld output %ld: %g, not %g\n", p.type, long(p.groups), long(i), got, sum), false;
  }
  return true;
}

bool run_linear() {
  SfLinear p{};
  p.type = int32_t(pick(0, 3));
  p.rows = pick(1, 5), p.in_features = one_of(1, 63, 130, 300), p.out_features = one_of(1, 40, 200);
  p.block = 64 * pick(1, 3), p.slab = pick(1, 3);
  const bool graded = pick(0, 2) == 0;
  const int threads = int(pick(1, 3));
  const int64_t blocks = (p.out_features + p.block - 1) / p.block;
  Buffer x(p.type, p.rows * p.in_features), w(p.type, p.out_features * p.in_features), bias(p.type, p.out_features);
  Buffer packed(p.type, blocks * p.block * p.in_features), out(p.type, p.rows * p.out_features);
  fill_events(x, p.rows * p.in_features, one_of(0, 5, 40, 100), graded);
  for (int64_t i = 0; i < p.out_features * p.in_features; i++) w.set(i, real());
  for (int64_t i = 0; i < p.out_features; i++) bias.set(i, real());
  const int64_t size[5] = {p.out_features, p.in_features, 1, 1, 1}, stride[5] = {p.in_features, 1, 0, 0, 0};
  sf_pack(w.bytes.data(), size, stride, 1, p.block, p.type, packed.bytes.data(), threads);
  const Scanned scanned(SfScan{p.rows, p.in_features, 1, 1, p.type, 1}, x, threads);
  sf_poison_workspace(0xFF);
  sf_linear(&p, x.bytes.data(), scanned.bits.data(), scanned.rows.data(), packed.bytes.data(), nullptr,
            bias.bytes.data(), out.bytes.data(), !scanned.counts[2], threads);
  for (int64_t i = 0; i < p.rows * p.out_features; i++) {
    const int64_t r = i / p.out_features, o = i % p.out_features;
    double sum = bias.get(o), magnitude = 0;
    for (int64_t k = 0; k < p.in_features; k++) {
      const double term = x.get(r * p.in_features + k) * w.get(o * p.in_features + k);
      sum += term, magnitude += std::fabs(term);
    }
    if (!close(out.get(i), sum, magnitude, p.type)) return std::printf("linear: type %d block %ld output %ld: %g, not %g\n", p.type, long(p.block), long(i), out.get(i), sum), false;
  }
  return true;
}

// Spikes of [images][pixels][channels], packed; counts of up to 3 where `most` says so.
struct Spikes {
  int64_t channels, words;
  std::vector<uint64_t> bits;
  std::vector<uint32_t> rows;
  std::vector<uint8_t> counts;

  Spikes(int64_t images, int64_t pixels, int64_t row_pixels, int64_t channels, int64_t percent, int64_t most)
      : channels(channels),
        words((channels + 63) / 64),
        bits(size_t(images * pixels * words)),
        rows(size_t(images * pixels / row_pixels)),
        counts(size_t(images * pixels * channels)) {
    for (int64_t i = 0; i < images * pixels * channels; i++) {
      if (pick(0, 99) >= percent) continue;
      const int64_t pixel = i / channels, c = i % channels;
      counts[size_t(i)] = uint8_t(pick(1, most));
      bits[size_t(pixel * words + c / 64)] |= uint64_t(1) << (c % 64);
      rows[size_t(pixel / row_pixels)]++;
    }
  }

  double at(int64_t image_pixel, int64_t channel) const { return counts[size_t(image_pixel * channels + channel)]; }
};

// A fused block's arrays, each of exactly the size that engine.py gives it, and the same computed with plain loops.
struct FusedBlock {
  SfBlock b{};
  std::vector<float> constants, scale, shift, residual, v, out;
  std::vector<uint64_t> bits;
  std::vector<uint32_t> rows;
  int64_t nonzero = 0, padded;
  Spikes added;
  int kind;

  FusedBlock(int64_t steps, int64_t batch, int64_t channels, const int64_t (&map)[3])
      : padded((channels + 15) / 16 * 16),
        added(steps * batch, map[0] * map[1] * map[2], map[2], channels, 20, 3),
        kind(int(pick(0, 2))) {
    b.steps = steps, b.batch = batch, b.channels = channels, b.pixels = 1;
    for (int d = 0; d < 3; d++) {
      b.map[d] = map[d], b.window[d] = map[d] > 1 ? one_of(1, 1, 2) : 1;
      b.pixels *= map[d] / b.window[d];
    }
    b.row_pixels = map[2] / b.window[2];
    scale = eighths(padded), shift = eighths(padded), v = eighths(batch * b.pixels * channels);
    if (pick(0, 1)) b.scale = scale.data(), b.shift = shift.data();
    residual = eighths(kind == 1 ? steps * batch * map[0] * map[1] * map[2] * channels : 0);
    if (kind == 1) b.residual = residual.data();
    if (kind == 2) b.residual_bits = added.bits.data(), b.residual_counts = added.counts.data();
    constants.assign(size_t(padded), 0.5f);
    SfNeuron& k = b.neuron;
    k.charge = int32_t(one_of(SF_NO_NEURON, SF_LEAK_INPUT_RATE, SF_INTEGRATE)), k.start = 0.25f;
    k.reset = int32_t(one_of(SF_HARD, SF_SOFT)), k.timing = SF_SAME_STEP;
    k.fires_above = k.threshold = k.decay = k.synapse_decay = constants.data();
    for (const float*& gain : k.gains) gain = constants.data();
    b.fresh = int32_t(pick(0, 1));
    bits.assign(size_t(steps * batch * b.pixels * ((channels + 63) / 64)), ~uint64_t(0));
    rows.assign(size_t(steps * batch * b.pixels / b.row_pixels), ~0u);
    out.assign(size_t(k.charge == SF_NO_NEURON ? steps * batch * b.pixels * channels : 0), -1.0f);
    b.v = v.data(), b.bits = bits.data(), b.row_counts = rows.data(), b.nonzero = &nonzero, b.out = out.data();
    if (k.charge == SF_NO_NEURON) b.row_counts = nullptr, b.nonzero = nullptr;
  }

  static std::vector<float> eighths(int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = float(pick(-8, 8)) / 8;
    return values;
  }

  float current(const std::vector<float>& sums, int64_t image, int64_t pixel, int64_t c) const {
    float x = sums[size_t((image * b.map[0] * b.map[1] * b.map[2] + pixel) * b.channels + c)];
    if (b.scale != nullptr) x = x * scale[size_t(c)] + shift[size_t(c)];
    const int64_t at = image * b.map[0] * b.map[1] * b.map[2] + pixel;
    if (kind == 1) x += residual[size_t(at * b.channels + c)];
    if (kind == 2) x += float(added.at(at, c));
    return x;
  }

  float pooled(const std::vector<float>& sums, int64_t image, int64_t pixel, int64_t c) const {
    const int64_t plane = b.map[1] / b.window[1], row = pixel / b.row_pixels;
    const int64_t d0 = row / plane * b.window[0], h0 = row % plane * b.window[1], w0 = pixel % b.row_pixels * b.window[2];
    float most = -INFINITY;
    for (int64_t d = d0; d < d0 + b.window[0]; d++) {
      for (int64_t h = h0; h < h0 + b.window[1]; h++) {
        for (int64_t w = w0; w < w0 + b.window[2]; w++) {
          most = std::fmax(most, current(sums, image, (d * b.map[1] + h) * b.map[2] + w, c));
        }
      }
    }
    return most;
  }

  // Whether results and the last state are those of `sums` [images][map][channels], from membranes as they were.
  bool right(const std::vector<float>& sums, const std::vector<float>& before) const {
    const SfNeuron& k = b.neuron;
    int64_t fired = 0;
    for (int64_t i = 0; i < b.batch * b.pixels * b.channels; i++) {
      const int64_t n = i / b.channels / b.pixels, pixel = i / b.channels % b.pixels, c = i % b.channels;
      float u = b.fresh ? k.start : before[size_t(i)];
      for (int64_t t = 0; t < b.steps; t++) {
        const int64_t image_pixel = (t * b.batch + n) * b.pixels + pixel;
        const float x = pooled(sums, t * b.batch + n, pixel, c);
        if (k.charge == SF_NO_NEURON) {
          if (out[size_t(image_pixel * b.channels + c)] != x) return false;
          continue;
        }
        const float h = k.charge == SF_INTEGRATE ? u + x : u + (x - u) * 0.5f;
        const bool spike = h > 0.5f;
        u = !spike ? h : k.reset == SF_HARD ? 0.0f : h - 0.5f;
        fired += spike;
        const uint64_t word = bits[size_t(image_pixel * ((b.channels + 63) / 64) + c / 64)];
        if ((word >> (c % 64) & 1) != uint64_t(spike)) return false;
      }
      if (k.charge != SF_NO_NEURON && v[size_t(i)] != u) return false;
    }
    return k.charge == SF_NO_NEURON || fired == nonzero;
  }
};

bool run_block() {
  SfConv p{};
  const int64_t steps = one_of(1, 2, 3, 3, 35), batch = pick(1, 2);
  p.type = SF_F32, p.groups = one_of(1, 1, 2), p.batch = steps * batch;
  const int64_t channels = one_of(1, 31, 70), outputs = p.groups > 1 ? one_of(16, 48) : one_of(1, 15, 33, 80);
  p.in_channels = p.groups * channels, p.out_channels = p.groups * outputs;
  for (int d = 0; d < 3; d++) {
    p.kernel[d] = d == 0 ? 1 : one_of(1, 3, 3, 5), p.stride[d] = d == 0 ? 1 : pick(1, 2);
    p.padding[d] = d == 0 ? 0 : pick(0, 2), p.dilation[d] = 1;
    p.in_size[d] = d == 0 ? pick(1, 2) : p.kernel[d] + pick(0, 5);
    p.out_size[d] = (p.in_size[d] + 2 * p.padding[d] - p.kernel[d]) / p.stride[d] + 1;
  }
  const int64_t plane = p.in_size[0] * p.in_size[1] * p.in_size[2], taps = p.kernel[1] * p.kernel[2];
  const Spikes x(p.batch, plane, p.in_size[2], p.in_channels, one_of(0, 5, 30, 100), one_of(1, 1, 3));
  FusedBlock fused(steps, batch, p.out_channels, p.out_size);
  for (int d = 0; d < 3; d++) p.out_size[d] = p.out_size[d] / fused.b.window[d] * fused.b.window[d];
  p.block = one_of(16, 32, 64), p.width = p.block * one_of(1, 2), p.slab = pick(1, 6), p.tile = one_of(1, 7, 64);
  p.x_channels_last = p.out_channels_last = 1, p.split_outputs = int32_t(pick(0, 1));
  const int threads = int(pick(1, 3));

  std::vector<float> weight = FusedBlock::eighths(p.out_channels * channels * taps);
  const int64_t size[5] = {p.out_channels, channels, 1, p.kernel[1], p.kernel[2]};
  const int64_t stride[5] = {channels * taps, taps, taps, p.kernel[2], 1};
  std::vector<float> packed(size_t((outputs + p.block - 1) / p.block * p.block * p.groups * channels * taps));
  sf_pack(weight.data(), size, stride, p.groups, p.block, SF_F32, packed.data(), threads);

  const int64_t map = fused.b.map[0] * fused.b.map[1] * fused.b.map[2];
  std::vector<float> sums(size_t(p.batch * map * p.out_channels));
  for (int64_t i = 0; i < int64_t(sums.size()); i++) {
    const int64_t o = i % p.out_channels, pixel = i / p.out_channels % map, image = i / p.out_channels / map;
    const int64_t ow = pixel % fused.b.map[2], oh = pixel / fused.b.map[2] % fused.b.map[1];
    const int64_t d = pixel / fused.b.map[2] / fused.b.map[1];
    for (int64_t tap = 0; tap < taps; tap++) {
      const int64_t h = oh * p.stride[1] - p.padding[1] + tap / p.kernel[2];
      const int64_t w = ow * p.stride[2] - p.padding[2] + tap % p.kernel[2];
      if (h < 0 || w < 0 || h >= p.in_size[1] || w >= p.in_size[2]) continue;
      for (int64_t c = 0; c < channels; c++) {
        const double value = x.at(image * plane + (d * p.in_size[1] + h) * p.in_size[2] + w, o / outputs * channels + c);
        sums[size_t(i)] += float(value) * weight[size_t((o * channels + c) * taps + tap)];
      }
    }
  }
  bool counted = false;
  for (const uint8_t count : x.counts) counted = counted || count > 1;
  const std::vector<float> before = fused.v;
  sf_poison_workspace(0xFF);
  if (pick(0, 3) == 0) {
    sf_block_dense(&fused.b, sums.data(), threads);
  } else {
    sf_block_conv(&p, &fused.b, x.bits.data(), x.rows.data(), counted ? x.counts.data() : nullptr, packed.data(), nullptr,
                  threads);
  }
  if (fused.right(sums, before)) return true;
  std::printf("block: %ld outputs, kernel %ld, charge %d\n", long(p.out_channels), long(p.kernel[2]), fused.b.neuron.charge);
  return false;
}

}  // namespace

int main() {
  int runs = 0;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512vbmi"}) {
    if (sf_select(isa) == nullptr) continue;
    for (int i = 0; i < 400; i++, runs++) {
      const uint64_t seed = state;
      if (!run_conv() || !run_linear() || (i % 2 == 0 && !run_block())) {
        std::printf("wrong result: %s, state %llu\n", isa, static_cast<unsigned long long>(seed));
        return 1;
      }
    }
  }
  std::printf("%d cases\n", runs);
  return 0;
}
