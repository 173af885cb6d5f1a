#include "cpu/product_avx512_bf16.h"

#include <immintrin.h>

#include "cpu/packed_weight.h"
#include "cpu/product_blocks.h"

namespace funnel::avx512_bf16 {
namespace {

constexpr int kLanes = 16;                // floats, or pairs of bfloat16, in a vector
constexpr int kVectors = kUnit / kLanes;  // of weights; with kBlockRows, 24 vectors of sums
constexpr int64_t kPairs = 512;           // most in a pass, whose part of x and weights stays in a core's cache

typedef uint32_t Pair __attribute__((aligned(2), may_alias));  // two bfloat16

// Columns [0, pairs) of kRows rows of x, `x_stride` pairs apart, times one unit of weights. The tile is added to,
// unless it is `fresh`. With each pair a line of `ahead` is fetched.
template <int kRows>
void multiply_rows(const Pair* x, int64_t x_stride, int64_t pairs, const Pair* weights, Lines ahead, bool fresh,
                   float* tile, int64_t tile_stride) {
  __m512 sums[kRows][kVectors] = {};
  if (!fresh) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_loadu_ps(tile + r * tile_stride + v * kLanes);
    }
  }
  for (int64_t i = 0; i < pairs; ++i, weights += kUnit) {
    ahead.fetch();
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(weights + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(x[r * x_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, columns[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(tile + r * tile_stride + v * kLanes, sums[r][v]);
  }
}

}  // namespace

void multiply(const void* x, int64_t rows, int64_t in_features, const void* weights, int64_t units, const void* next,
              float* tile) {
  const int64_t depth = in_features / 2, stride = units * kUnit;
  const int64_t unit_words = words_of(in_features, Dtype::bfloat16) * kUnit;
  const int64_t passes = divide_up(depth, kPairs), pass = divide_up(depth, passes);
  const Blocks blocks(rows);
  const auto packed = [&](int64_t unit, int64_t first) {
    return static_cast<const Pair*>(weights) + unit * unit_words + first * kUnit;
  };
  for (int64_t first = 0; first < depth; first += pass) {
    const auto* from = static_cast<const Pair*>(x) + first;
    const int64_t pairs = smaller(pass, depth - first);
    for (int64_t unit = 0; unit < units; ++unit) {
      const Pair* following = unit + 1 < units       ? packed(unit + 1, first)
                              : first + pass < depth ? packed(0, first + pass)
                                                     : static_cast<const Pair*>(next);
      Ahead ahead(following, pairs * kUnit * 4, blocks.count);
      blocks.for_each([&](auto block_rows, int64_t row) {
        multiply_rows<block_rows.value>(from + row * depth, depth, pairs, packed(unit, first), ahead.take(pairs),
                                        first == 0, tile + row * stride + unit * kUnit, stride);
      });
    }
  }
}

}  // namespace funnel::avx512_bf16
