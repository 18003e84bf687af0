// The C ABI between engine.py and the native engine. Mirrored field by field by ctypes structures in engine.py;
// raise SF_ABI_VERSION when anything here changes.
#pragma once

#include <stdint.h>

#define SF_ABI_VERSION 5

enum SfType : int32_t { SF_F32 = 0, SF_BF16 = 1, SF_F16 = 2, SF_F64 = 3, SF_TYPES = 4 };

// `width` of a linear layer inside a fused block whose weight rows are streamed, as SfLinear's are.
#define SF_ROWS 1

// One convolution, always with three spatial dimensions [D, H, W]; spikes are [batch, C, D, H, W].
struct SfConv {
  int64_t batch, in_channels, out_channels, groups;
  int64_t in_size[3], kernel[3], stride[3], padding[3], dilation[3], out_size[3];
  int64_t block;  // output channels that lie next to each other in a packed weight row
  int64_t width;  // output channels accumulated in one pass over the events; a multiple of `block`
  int64_t slab;   // (kernel row, input word) pairs whose weights one pass may touch
  int64_t tile;   // output pixels per tile
  int32_t type, x_channels_last, out_channels_last;
  int32_t split_outputs;  // threads share the pixels (0) or the output channels (1)
};

// x viewed as [batch, channels, pixels]; a "row" is `row_pixels` neighbouring pixels.
struct SfScan {
  int64_t batch, channels, pixels, row_pixels;
  int32_t type, channels_last;
};

struct SfLinear {
  int64_t rows, in_features, out_features, block, slab;
  int32_t type;
};

// How a neuron steps; the enumerators follow sparseflow/neuron.py. Constants are float32 arrays that may be read up to
// SF_PADDING elements past the last channel.
#define SF_PADDING 128

enum SfCharge : int32_t {
  SF_NO_NEURON = -1,
  SF_INTEGRATE = 0,
  SF_LEAK_INPUT = 1,
  SF_LEAK = 2,
  SF_LEAK_INPUT_RATE = 3,
  SF_LEAK_RATE = 4,
  SF_DECAY = 5,
  SF_DECAY_GAIN = 6,
  SF_SYNAPTIC = 7,
};
enum SfReset : int32_t { SF_HARD = 0, SF_SOFT = 1, SF_NONE = 2 };
enum SfTiming : int32_t { SF_SAME_STEP = 0, SF_NEXT_STEP = 1, SF_BOTH = 2 };

struct SfNeuron {
  int32_t charge, reset, timing;
  float reset_value, rest, start;   // value after a hard reset; resting value of the charge; membrane of a fresh state
  const float* fires_above;         // the neuron fires where v > fires_above
  const float* threshold;
  const float* decay;
  const float* gains[3];
  const float* synapse_decay;
};

// What follows the sums of a layer: x = sums * scale + shift + residual, the maximum over windows, then a neuron over all
// time steps. Sums and residual are [steps * batch, map pixels, channels], results of blocks without a neuron too; state
// is [batch, pixels, channels], bits [images, pixels, words].
struct SfBlock {
  int64_t steps, batch, pixels, row_pixels, channels;
  int64_t window[3];                // [D, H, W]; windows lie side by side, what is left of the map at its end is dropped
  int64_t map[3];                   // of the sums
  const float* scale;               // null: left out
  const float* shift;
  const float* residual;            // at most one of the three
  const uint64_t* residual_bits;
  const uint8_t* residual_counts;   // read together with residual_bits
  SfNeuron neuron;
  float* v;
  float* syn;                       // null for a neuron without synaptic current
  float* v_seq;                     // null: not wanted
  uint64_t* bits;                   // results of a neuron, with one count per row of pixels
  uint32_t* row_counts;             // zeroed by the callee
  int64_t* nonzero;                 // their sum
  float* out;                       // result without a neuron
  int32_t fresh;                    // the state is not read
  int32_t invariant;                // dense sums are [batch, pixels, channels], the same at every step
};

// One of several blocks that run one after the other in one call: everything about it but how many spikes it gets.
struct SfLink {
  const SfConv* const* convs;       // by the bit length of the input's nonzeros; null where there is none yet
  const SfBlock* block;
  const uint64_t* bits;
  const uint32_t* row_counts;
  const uint8_t* counts;            // as for block_conv
  const float* packed;
  const int32_t* index;             // of a weight in blocks, else null
  const int64_t* nonzero;           // of the input
  int64_t most;                     // nonzeros above which the block does not run on events
  int64_t event_work, fixed_work;   // additions for each nonzero and for the rest, by which threads are woken
  int64_t seen;                     // result: the nonzeros of this call
};

// Memory that must not change: `size` bytes at `at` are compared at every call, and one word in each of SF_SAMPLES equal
// parts of it when it is its turn.
#define SF_SAMPLES 8
#define SF_PIECE 32
struct SfWatched {
  const char* data;
  int64_t bytes, at, size;
  char piece[SF_PIECE];
  char samples[SF_SAMPLES][4];
};

// Pooling of packed spikes [images, in pixels, words].
struct SfPool {
  int64_t images, channels;
  int64_t in_size[3], out_size[3], kernel[3], stride[3], padding[3], dilation[3];
  int32_t include_pad;
};

// One instruction set's implementations, indexed by SfType.
struct SfKernels {
  const char* isa;
  void (*prescan[SF_TYPES])(const SfScan&, const void* x, uint64_t* bits, uint32_t* row_counts, int64_t* counts,
                            int threads);
  // Both return 0, or 1 if there was no memory for the workspace. `index` says which blocks of a block-sparse weight
  // there are (blocksparse.h; for `linear` blockrows.h) and is null for a full one.
  int (*conv[SF_TYPES])(const SfConv&, const void* x, const uint64_t* bits, const uint32_t* row_counts,
                         const void* packed, const int32_t* index, const void* bias, void* out, int graded, int threads);
  int (*linear[SF_TYPES])(const SfLinear&, const void* x, const uint64_t* bits, const uint32_t* row_counts,
                           const void* packed, const int32_t* index, const void* bias, void* out, int graded, int threads);
  // Float32. `counts` are the spikes' values where some are above 1, else null.
  int (*block_conv)(const SfConv&, const SfBlock&, const uint64_t* bits, const uint32_t* row_counts,
                    const uint8_t* counts, const float* packed, const int32_t* index, int threads);
  int (*block_dense)(const SfBlock&, const float* sums, int threads);
  void (*unpack)(const uint64_t* bits, const uint8_t* counts, int64_t pixels, int64_t channels, float* out, int threads);
  void (*add)(const uint64_t* a_bits, const uint8_t* a_counts, const uint64_t* b_bits, const uint8_t* b_counts,
              int64_t rows, int64_t row_pixels, int64_t channels, uint64_t* bits, uint8_t* counts, uint32_t* row_counts,
              int threads);
  void (*logical)(const uint64_t* a, const uint64_t* b, int op, int64_t rows, int64_t row_words, uint64_t* bits,
                  uint32_t* row_counts, int threads);
  void (*max_pool)(const SfPool&, const uint64_t* x, uint64_t* bits, uint32_t* row_counts, int threads);
  void (*avg_pool)(const SfPool&, const uint64_t* x, const uint8_t* counts, float* out, int threads);
  void (*concat)(int parts, const uint64_t* const* bits, const int64_t* channels, int64_t rows, int64_t row_pixels,
                 uint64_t* out, uint32_t* row_counts, int threads);
};

extern "C" {
// Grow-only scratch memory of the calling thread, 64-byte aligned, contents unspecified; null when memory is out.
void* sf_workspace(int64_t bytes);
}
