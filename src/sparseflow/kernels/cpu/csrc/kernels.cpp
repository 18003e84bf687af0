// Compiled once per instruction set; see build.py for the flags. Exports nothing but one table.

#include "abi.h"
#include "block.h"
#include "blockrows.h"
#include "blocksparse.h"
#include "conv.h"
#include "depthwise.h"
#include "linear.h"
#include "packed.h"
#include "prescan.h"

#define SF_STRING_(x) #x
#define SF_STRING(x) SF_STRING_(x)
#define SF_TABLE_(isa) sf_kernels_##isa
#define SF_TABLE(isa) SF_TABLE_(isa)

namespace sparseflow::SF_NAMESPACE {

template <class T>
int conv(const SfConv& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
          const int32_t* index, const void* bias, void* out, int graded, int threads) {
  if (p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels) {
    return DepthwiseConv<T>(p, x, bits, row_counts, packed, bias, out, graded != 0, threads).run();
  }
  const DenseSink<T> sink(p, out);
  const auto* elements = static_cast<const typename T::Element*>(x);
  if (index != nullptr) {
    using Kernel = BlockConv<T, DenseSink<T>>;
    return Kernel(p, elements, bits, row_counts, packed, index, bias, sink, graded != 0, threads).run();
  }
  return Conv<T, DenseSink<T>>(p, elements, bits, row_counts, packed, bias, sink, graded != 0, threads).run();
}

// Few rows of a linear layer: its weight rows are streamed, and what follows the sums has its turn when all are there.
int block_rows(const SfConv& p, const SfBlock& block, const uint64_t* bits, const uint32_t* row_counts,
               const uint8_t* counts, const float* packed, int threads) {
  const SfLinear rows{p.batch, p.in_channels, p.out_channels, p.block, p.slab, SF_F32};
  Linear<Float32, uint8_t> linear(rows, counts, bits, row_counts, packed, nullptr, counts != nullptr, threads);
  // Both parts take the workspace from its beginning; the sums lie behind.
  const int64_t shared = (max(linear.bytes(), threads * dense_staging(block)) + 63) / 64 * 64;
  auto* memory = static_cast<char*>(sf_workspace(shared + p.batch * p.out_channels * int64_t(sizeof(float))));
  if (memory == nullptr) return 1;
  auto* sums = reinterpret_cast<float*>(memory + shared);
  const int status = linear.run(sums);
  return status != 0 ? status : block_dense_rows(block, sums, threads);
}

int block_conv(const SfConv& p, const SfBlock& block, const uint64_t* bits, const uint32_t* row_counts,
               const uint8_t* counts, const float* packed, const int32_t* index, int threads) {
  if (p.width == SF_ROWS) return block_rows(p, block, bits, row_counts, counts, packed, threads);
  const BlockSink sink(block);
  SfConv fitted = p;
  fitted.tile = max(1, p.tile / sink.column_multiple()) * sink.column_multiple();
  if (index != nullptr) {
    using Kernel = BlockConv<Float32, BlockSink>;
    return Kernel(fitted, counts, bits, row_counts, packed, index, nullptr, sink, counts != nullptr, threads).run();
  }
  return Conv<Float32, BlockSink>(fitted, counts, bits, row_counts, packed, nullptr, sink, counts != nullptr, threads).run();
}

int block_dense(const SfBlock& block, const float* sums, int threads) { return block_dense_rows(block, sums, threads); }

void unpack(const uint64_t* bits, const uint8_t* counts, int64_t pixels, int64_t channels, float* out, int threads) {
  unpack_spikes(bits, counts, pixels, channels, out, threads);
}

void add(const uint64_t* a_bits, const uint8_t* a_counts, const uint64_t* b_bits, const uint8_t* b_counts, int64_t rows,
         int64_t row_pixels, int64_t channels, uint64_t* bits, uint8_t* counts, uint32_t* row_counts, int threads) {
  add_spikes(a_bits, a_counts, b_bits, b_counts, rows, row_pixels, channels, bits, counts, row_counts, threads);
}

void logical(const uint64_t* a, const uint64_t* b, int op, int64_t rows, int64_t row_words, uint64_t* bits,
             uint32_t* row_counts, int threads) {
  combine_spikes(a, b, op, rows, row_words, bits, row_counts, threads);
}

void max_pool(const SfPool& s, const uint64_t* x, uint64_t* bits, uint32_t* row_counts, int threads) {
  max_pool_spikes(s, x, bits, row_counts, threads);
}

void avg_pool(const SfPool& s, const uint64_t* x, const uint8_t* counts, float* out, int threads) {
  avg_pool_spikes(s, x, counts, out, threads);
}

void concat(int parts, const uint64_t* const* bits, const int64_t* channels, int64_t rows, int64_t row_pixels,
            uint64_t* out, uint32_t* row_counts, int threads) {
  concat_spikes(parts, bits, channels, rows, row_pixels, out, row_counts, threads);
}

template <class T>
int linear(const SfLinear& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
            const int32_t* index, const void* bias, void* out, int graded, int threads) {
  if (index != nullptr) return BlockRows<T>(p, x, bits, packed, index, bias, out, graded != 0, threads).run();
  return Linear<T>(p, x, bits, row_counts, packed, bias, graded != 0, threads).run(out);
}

}  // namespace sparseflow::SF_NAMESPACE

using namespace sparseflow::SF_NAMESPACE;

extern const SfKernels SF_TABLE(SF_NAMESPACE);
const SfKernels SF_TABLE(SF_NAMESPACE) = {
    SF_STRING(SF_NAMESPACE),
    {prescan<Float32>, prescan<BFloat16>, prescan<Float16>, prescan<Float64>},
    {conv<Float32>, conv<BFloat16>, conv<Float16>, conv<Float64>},
    {linear<Float32>, linear<BFloat16>, linear<Float16>, linear<Float64>},
    block_conv,
    block_dense,
    unpack,
    add,
    logical,
    max_pool,
    avg_pool,
    concat,
};
