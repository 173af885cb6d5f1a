// The product of a tile in float32 arithmetic, for every processor with AVX2; with weights of float32 or bfloat16.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

constexpr int64_t kPanel = 256 * 64;  // floats of the memory that a product of bfloat16 weights needs

// tile [rows, units * kUnit] = x [rows, in_features] times `units` packed units (packed_weight.h). There is at least
// one row and one unit.
//
// Weights of bfloat16 are widened, which is exact: in registers where there are few rows, else once for all rows of the
// tile, into `panel` [kPanel]. While a unit is multiplied, the next one is fetched from memory; after the last one it
// is the unit at `next`.
FUNNEL_KERNEL(void, multiply_float32, const float* x, int64_t rows, int64_t in_features, const void* weights,
              bool weights_are_bfloat16, int64_t units, const void* next, float* panel, float* tile)

// Adds a bias [columns] to each row of a tile.
FUNNEL_KERNEL(void, add_bias, const float* bias, int64_t rows, int64_t columns, int64_t stride, float* tile)

// bfloat16 as float32.
FUNNEL_KERNEL(void, widen, const void* bfloat16, int64_t count, float* out)

}  // namespace funnel
