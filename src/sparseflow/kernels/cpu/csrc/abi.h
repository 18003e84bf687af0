// The C ABI between engine.py and the native engine. Mirrored field by field by ctypes structures in engine.py;
// raise SF_ABI_VERSION when anything here changes.
#pragma once

#include <stdint.h>

#define SF_ABI_VERSION 1

enum SfType : int32_t { SF_F32 = 0, SF_BF16 = 1, SF_F16 = 2, SF_F64 = 3, SF_TYPES = 4 };

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

// One instruction set's implementations, indexed by SfType.
struct SfKernels {
  const char* isa;
  void (*prescan[SF_TYPES])(const SfScan&, const void* x, uint64_t* bits, uint32_t* row_counts, int64_t* counts,
                            int threads);
  // Both return 0, or 1 if there was no memory for the workspace.
  int (*conv[SF_TYPES])(const SfConv&, const void* x, const uint64_t* bits, const uint32_t* row_counts,
                         const void* packed, const void* bias, void* out, int graded, int threads);
  int (*linear[SF_TYPES])(const SfLinear&, const void* x, const uint64_t* bits, const uint32_t* row_counts,
                           const void* packed, const void* bias, void* out, int graded, int threads);
};

extern "C" {
// Grow-only scratch memory of the calling thread, 64-byte aligned, contents unspecified; null when memory is out.
void* sf_workspace(int64_t bytes);
}
