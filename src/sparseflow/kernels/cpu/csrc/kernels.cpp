// Compiled once per instruction set; see build.py for the flags. Exports nothing but one table.

#include "abi.h"
#include "conv.h"
#include "depthwise.h"
#include "linear.h"
#include "prescan.h"

#define SF_STRING_(x) #x
#define SF_STRING(x) SF_STRING_(x)
#define SF_TABLE_(isa) sf_kernels_##isa
#define SF_TABLE(isa) SF_TABLE_(isa)

namespace sparseflow::SF_NAMESPACE {

template <class T>
int conv(const SfConv& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
          const void* bias, void* out, int graded, int threads) {
  if (p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels) {
    return DepthwiseConv<T>(p, x, bits, row_counts, packed, bias, out, graded != 0, threads).run();
  }
  return Conv<T>(p, x, bits, row_counts, packed, bias, out, graded != 0, threads).run();
}

template <class T>
int linear(const SfLinear& p, const void* x, const uint64_t* bits, const uint32_t* row_counts, const void* packed,
            const void* bias, void* out, int graded, int threads) {
  return Linear<T>(p, x, bits, row_counts, packed, bias, out, graded != 0, threads).run();
}

}  // namespace sparseflow::SF_NAMESPACE

using namespace sparseflow::SF_NAMESPACE;

extern const SfKernels SF_TABLE(SF_NAMESPACE);
const SfKernels SF_TABLE(SF_NAMESPACE) = {
    SF_STRING(SF_NAMESPACE),
    {prescan<Float32>, prescan<BFloat16>, prescan<Float16>, prescan<Float64>},
    {conv<Float32>, conv<BFloat16>, conv<Float16>, conv<Float64>},
    {linear<Float32>, linear<BFloat16>, linear<Float16>, linear<Float64>},
};
