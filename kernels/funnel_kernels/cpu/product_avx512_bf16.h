// The product of a tile in bfloat16, for processors that multiply it in AVX-512's registers.
#pragma once

#include <stdint.h>

namespace funnel {
namespace avx512_bf16 {

// tile [rows, units * kUnit] = x [rows, in_features] times `units` packed units (packed_weight.h). There is at least
// one row and one unit, and in_features is even.
//
// While a unit is multiplied, the next one is fetched from memory; after the last one it is the unit at `next`.
// oneDNN's kernel waits for a tile's weights when it first reads them, and computes then: with 19 rows of 768 input
// features it takes half as long again.
void multiply(const void* x, int64_t rows, int64_t in_features, const void* weights, int64_t units, const void* next,
              float* tile);

}  // namespace avx512_bf16
}  // namespace funnel
