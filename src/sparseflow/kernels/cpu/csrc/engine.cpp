// The exported functions: picks an instruction set, owns the workspaces, packs weights.

#include <stdlib.h>
#include <string.h>

#include "abi.h"

extern const SfKernels sf_kernels_portable;
#if defined(__x86_64__)
extern const SfKernels sf_kernels_avx2;
extern const SfKernels sf_kernels_avx512;
extern const SfKernels sf_kernels_avx512vbmi;
#endif

namespace {

class Workspace {
 public:
  ~Workspace() { free(memory_); }

  void* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      free(memory_);
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      capacity_ = posix_memalign(&memory_, 64, size_t(rounded)) == 0 ? rounded : 0;
      if (capacity_ == 0) memory_ = nullptr;
    }
    return memory_;
  }

  void fill(int byte) {
    if (memory_ != nullptr) memset(memory_, byte, size_t(capacity_));
  }

 private:
  void* memory_ = nullptr;
  int64_t capacity_ = 0;
};

thread_local Workspace workspace;

const SfKernels* const kCandidates[] = {
#if defined(__x86_64__)
    &sf_kernels_avx512vbmi,
    &sf_kernels_avx512,
    &sf_kernels_avx2,
#endif
    &sf_kernels_portable,
};

bool runs_here(const SfKernels* kernels) {
#if defined(__x86_64__)
  if (kernels == &sf_kernels_avx512 || kernels == &sf_kernels_avx512vbmi) {
    const bool vbmi = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           (vbmi || kernels == &sf_kernels_avx512);
  }
  if (kernels == &sf_kernels_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
#endif
  return kernels == &sf_kernels_portable;
}

const SfKernels* kernels = nullptr;

int64_t element_bytes(int type) { return type == SF_F64 ? 8 : type == SF_F32 ? 4 : 2; }

struct WeightView {
  const char* data;
  int64_t size[5], stride[5];  // out, in, kd, kh, kw; strides in elements

  WeightView(const void* data, const int64_t* size, const int64_t* stride) : data(static_cast<const char*>(data)) {
    memcpy(this->size, size, sizeof this->size);
    memcpy(this->stride, stride, sizeof this->stride);
  }

  int64_t at(int64_t o, int64_t tap, int64_t c) const {
    const int64_t kw = tap % size[4], kh = tap / size[4] % size[3], kd = tap / size[4] / size[3];
    return o * stride[0] + c * stride[1] + kd * stride[2] + kh * stride[3] + kw * stride[4];
  }
};

// Where weight (output o, tap, channel c of its group) lies in a packed tensor. Taps are counted [kd][kh][kw].
struct PackedOrder {
  int64_t outputs, channels, taps, columns, block, blocks;
  bool interleaved;

  PackedOrder(const WeightView& w, int64_t groups, int64_t block, int type)
      : outputs(w.size[0] / groups),
        channels(w.size[1]),
        taps(w.size[2] * w.size[3] * w.size[4]),
        columns(w.size[4]),
        block(block),
        blocks((outputs + block - 1) / block),
        interleaved(type == SF_BF16) {}

  int64_t at(int64_t o, int64_t tap, int64_t c) const {
    const int64_t group = o / outputs, within = o % outputs;
    return row(group * blocks + within / block, tap, c) + place(within % block);
  }

  // Where a row of `block` weights begins: those of one kernel row and channel lie side by side.
  int64_t row(int64_t block_index, int64_t tap, int64_t c) const {
    return ((block_index * taps + tap / columns * columns) * channels + c * columns + tap % columns) * block;
  }

  // Place of output channel i within its block; packed_place in simd.h is the kernels' view of the same order.
  int64_t place(int64_t i) const { return interleaved ? i / 32 * 32 + i % 16 * 2 + i / 16 % 2 : i; }
};

// The same for a weight of which only the blocks that are not zero are kept: -1 for an element of an absent one.
struct BlockOrder {
  static constexpr int64_t kBlock = 16;
  const int32_t* places;
  int64_t channels, taps, input_blocks;

  BlockOrder(const WeightView& w, const int32_t* index)
      : places(index),
        channels(w.size[1]),
        taps(w.size[2] * w.size[3] * w.size[4]),
        input_blocks((channels + kBlock - 1) / kBlock) {}

  int64_t at(int64_t o, int64_t tap, int64_t c) const {
    const int64_t place = places[(o / kBlock * input_blocks + c / kBlock) * taps + tap];
    return place < 0 ? -1 : (place * kBlock + c % kBlock) * kBlock + o % kBlock;
  }
};

// The same for the rows of a linear layer, as blockrows.h reads them.
struct BlockRowsOrder {
  static constexpr int64_t kBlock = 16;
  const int32_t *starts, *outputs;
  int64_t channels, taps = 1;

  BlockRowsOrder(const WeightView& w, const int32_t* index)
      : starts(index), outputs(index + (w.size[1] + kBlock - 1) / kBlock + 1), channels(w.size[1]) {}

  int64_t at(int64_t o, int64_t, int64_t c) const {
    const int64_t first = starts[c / kBlock], blocks = starts[c / kBlock + 1] - first;
    for (int64_t i = 0; i < blocks; i++) {
      if (outputs[first + i] != o / kBlock) continue;
      return first * kBlock * kBlock + (c % kBlock * blocks + i) * kBlock + o % kBlock;
    }
    return -1;
  }
};

int64_t sum(const uint32_t* row_counts, int64_t rows) {
  int64_t total = 0;
  for (int64_t i = 0; i < rows; i++) total += row_counts[i];
  return total;
}

void sum_spikes(const SfBlock& b) {
  if (b.nonzero != nullptr) *b.nonzero = sum(b.row_counts, b.steps * b.batch * (b.pixels / b.row_pixels));
}

int bit_length(int64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(uint64_t(value)); }

// Where sample i of watched memory lies.
const char* sample_of(const SfWatched& w, int64_t i) { return w.data + w.bytes / 4 * i / SF_SAMPLES * 4; }

template <class Element>
void pack(const WeightView& w, const PackedOrder& order, Element* packed, int threads) {
  const auto* data = reinterpret_cast<const Element*>(w.data);
  const int64_t groups = w.size[0] / order.outputs, block = order.block;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < groups * order.blocks; b++) {
    for (int64_t tap = 0; tap < order.taps; tap++) {
      const int64_t within = b % order.blocks * block, first = b / order.blocks * order.outputs + within;
      const int64_t left = order.outputs - within, valid = left < block ? left : block;
      Element* row = packed + order.row(b, tap, 0);
      for (int64_t c = 0; c < order.channels; c++, row += order.columns * block) {
        const Element* from = data + w.at(first, tap, c);
        for (int64_t i = 0; i < block; i++) row[order.place(i)] = i < valid ? from[i * w.stride[0]] : Element(0);
      }
    }
  }
}

template <class Element, class Order>
bool match(const WeightView& w, const Order& order, const Element* packed, int64_t offset, int64_t samples) {
  const auto* data = reinterpret_cast<const Element*>(w.data);
  const int64_t taps = order.taps, channels = order.channels, total = w.size[0] * taps * channels;
  for (int64_t i = 0; i < samples; i++) {
    // One sample in each of `samples` equal strata, at a place inside it that moves with `offset`.
    const int64_t begin = total * i / samples, end = total * (i + 1) / samples;
    if (begin == end) continue;
    const uint64_t scattered = uint64_t(offset) * 0x9e3779b97f4a7c15u + uint64_t(i) * 0xbf58476d1ce4e5b9u;
    const int64_t sample = begin + int64_t((scattered >> 20) % uint64_t(end - begin));
    const int64_t o = sample / (channels * taps), c = sample / taps % channels, tap = sample % taps;
    const int64_t place = order.at(o, tap, c);
    const Element value = data[w.at(o, tap, c)];
    if (place < 0 ? Element(value << 1) != 0 : value != packed[place]) return false;  // a zero may have a sign
  }
  return true;
}

template <class Order>
bool match_of(int type, const WeightView& w, const Order& order, const void* packed, int64_t offset,
              int64_t samples) {
  if (element_bytes(type) == 2) return match(w, order, static_cast<const uint16_t*>(packed), offset, samples);
  if (element_bytes(type) == 4) return match(w, order, static_cast<const uint32_t*>(packed), offset, samples);
  return match(w, order, static_cast<const uint64_t*>(packed), offset, samples);
}

}  // namespace

extern "C" {

#define SF_EXPORT __attribute__((visibility("default")))

void* sf_workspace(int64_t bytes) { return workspace.reserve(bytes); }

SF_EXPORT int sf_abi_version() { return SF_ABI_VERSION; }

// Picks an instruction set by name, or the best one for an empty name. Returns its name, null if it cannot run here.
SF_EXPORT const char* sf_select(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const SfKernels* candidate : kCandidates) {
    if (runs_here(candidate) && (isa[0] == '\0' || strcmp(isa, candidate->isa) == 0)) {
      kernels = candidate;
      return candidate->isa;
    }
  }
  return nullptr;
}

SF_EXPORT const char* sf_isa() { return kernels->isa; }

SF_EXPORT void sf_prescan(const SfScan* s, const void* x, uint64_t* bits, uint32_t* row_counts, int64_t* counts,
                          int threads) {
  kernels->prescan[s->type](*s, x, bits, row_counts, counts, threads);
}

SF_EXPORT int sf_conv(const SfConv* p, const void* x, const uint64_t* bits, const uint32_t* row_counts,
                      const void* packed, const int32_t* index, const void* bias, void* out, int graded, int threads) {
  return kernels->conv[p->type](*p, x, bits, row_counts, packed, index, bias, out, graded, threads);
}

SF_EXPORT int sf_linear(const SfLinear* p, const void* x, const uint64_t* bits, const uint32_t* row_counts,
                        const void* packed, const int32_t* index, const void* bias, void* out, int graded,
                        int threads) {
  return kernels->linear[p->type](*p, x, bits, row_counts, packed, index, bias, out, graded, threads);
}

SF_EXPORT int sf_block_conv(const SfConv* p, const SfBlock* block, const uint64_t* bits, const uint32_t* row_counts,
                            const uint8_t* counts, const float* packed, const int32_t* index, int threads) {
  const int status = kernels->block_conv(*p, *block, bits, row_counts, counts, packed, index, threads);
  sum_spikes(*block);
  return status;
}

// Runs links in order up to the first that is not for events, or for which there is no SfConv. Returns how many ran,
// -1 if memory ran out.
SF_EXPORT int64_t sf_chain(SfLink* links, int64_t n, int threads, int64_t parallel_work) {
  for (int64_t i = 0; i < n; i++) {
    SfLink& link = links[i];
    const int64_t nonzero = link.seen = *link.nonzero;
    const SfConv* conv = link.convs[bit_length(nonzero)];
    if (nonzero > link.most || conv == nullptr) return i;
    const bool parallel = nonzero * link.event_work + link.fixed_work >= parallel_work;
    const int status = sf_block_conv(conv, link.block, link.bits, link.row_counts, link.counts, link.packed,
                                     link.index, parallel ? threads : 1);
    if (status != 0) return -1;
  }
  return n;
}

SF_EXPORT int sf_block_dense(const SfBlock* block, const float* sums, int threads) {
  const int status = kernels->block_dense(*block, sums, threads);
  sum_spikes(*block);
  return status;
}

SF_EXPORT void sf_unpack(const uint64_t* bits, const uint8_t* counts, int64_t pixels, int64_t channels, float* out,
                         int threads) {
  kernels->unpack(bits, counts, pixels, channels, out, threads);
}

SF_EXPORT void sf_add(const uint64_t* a_bits, const uint8_t* a_counts, const uint64_t* b_bits, const uint8_t* b_counts,
                      int64_t rows, int64_t row_pixels, int64_t channels, uint64_t* bits, uint8_t* counts,
                      uint32_t* row_counts, int64_t* nonzero, int threads) {
  kernels->add(a_bits, a_counts, b_bits, b_counts, rows, row_pixels, channels, bits, counts, row_counts, threads);
  *nonzero = sum(row_counts, rows);
}

SF_EXPORT void sf_logical(const uint64_t* a, const uint64_t* b, int op, int64_t rows, int64_t row_words, uint64_t* bits,
                          uint32_t* row_counts, int64_t* nonzero, int threads) {
  kernels->logical(a, b, op, rows, row_words, bits, row_counts, threads);
  *nonzero = sum(row_counts, rows);
}

SF_EXPORT void sf_max_pool(const SfPool* pool, const uint64_t* x, uint64_t* bits, uint32_t* row_counts,
                           int64_t* nonzero, int threads) {
  kernels->max_pool(*pool, x, bits, row_counts, threads);
  *nonzero = sum(row_counts, pool->images * pool->out_size[0] * pool->out_size[1]);
}

SF_EXPORT void sf_avg_pool(const SfPool* pool, const uint64_t* x, const uint8_t* counts, float* out, int threads) {
  kernels->avg_pool(*pool, x, counts, out, threads);
}

SF_EXPORT void sf_concat(int parts, const uint64_t* const* bits, const int64_t* channels, int64_t rows,
                         int64_t row_pixels, uint64_t* out, uint32_t* row_counts, int64_t* nonzero, int threads) {
  kernels->concat(parts, bits, channels, rows, row_pixels, out, row_counts, threads);
  *nonzero = sum(row_counts, rows);
}

// Weight [O, C/groups, KD, KH, KW] with any strides -> packed [groups][blocks][KD, KH][C/groups][KW][block].
SF_EXPORT void sf_pack(const void* weight, const int64_t* size, const int64_t* stride, int64_t groups, int64_t block,
                       int type, void* packed, int threads) {
  const WeightView w(weight, size, stride);
  const PackedOrder order(w, groups, block, type);
  if (element_bytes(type) == 2) return pack(w, order, static_cast<uint16_t*>(packed), threads);
  if (element_bytes(type) == 4) return pack(w, order, static_cast<uint32_t*>(packed), threads);
  pack(w, order, static_cast<uint64_t*>(packed), threads);
}

// 1 if `samples` stratified elements of the weight equal their packed copies. `index` is null for a full weight; with one,
// `block` is 1 for the rows of a linear layer.
SF_EXPORT int sf_match(const void* weight, const int64_t* size, const int64_t* stride, int64_t groups, int64_t block,
                       int type, const void* packed, const int32_t* index, int64_t offset, int64_t samples) {
  const WeightView w(weight, size, stride);
  if (index != nullptr && block == 1) return match_of(type, w, BlockRowsOrder(w, index), packed, offset, samples);
  if (index != nullptr) return match_of(type, w, BlockOrder(w, index), packed, offset, samples);
  return match_of(type, w, PackedOrder(w, groups, block, type), packed, offset, samples);
}

// Takes what is there now as what has to be there.
SF_EXPORT void sf_watch(SfWatched* watched, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    SfWatched& w = watched[i];
    memcpy(w.piece, w.data + w.at, w.size);
    for (int64_t k = 0; k < SF_SAMPLES && w.bytes >= 4; k++) memcpy(w.samples[k], sample_of(w, k), 4);
  }
}

// 1 if nothing seems changed; of the memory `turn` the samples are looked at as well.
SF_EXPORT int sf_watched_hold(const SfWatched* watched, int64_t n, int64_t turn) {
  for (int64_t i = 0; i < n; i++) {
    const SfWatched& w = watched[i];
    if (memcmp(w.piece, w.data + w.at, w.size) != 0) return 0;
  }
  const SfWatched& w = watched[turn];
  for (int64_t k = 0; k < SF_SAMPLES && w.bytes >= 4; k++) {
    if (memcmp(w.samples[k], sample_of(w, k), 4) != 0) return 0;
  }
  return 1;
}

// Tests only: overwrites this thread's scratch memory, so that a kernel that reads what it did not write is found out.
SF_EXPORT void sf_poison_workspace(int byte) { workspace.fill(byte); }
}
