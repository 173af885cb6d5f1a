// The product of a tile with weights of int8, for every processor with AVX2.
//
// x is quantized while it runs: in each row, kGroup neighbouring input features have a scale, the largest absolute
// value divided by 127, and a value is the nearest integer to x / scale. int32 sums of a group become float32, times
// the scale of x; their total is multiplied with the scale of the weight. With VNNI, one instruction multiplies four
// values without sign by four with sign, so there x is stored as uint8, 128 too large, and the sums begin with the
// `offsets` of the packed weight. Without it, x is int16.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

// As FUNNEL_FORM, for the instruction sets that differ here.
#define FUNNEL_INT8_FORM(name, set)                                             \
  ((set) >= ::funnel::InstructionSet::avx512_vnni ? ::funnel::avx512_vnni::name \
   : (set) == ::funnel::InstructionSet::avx512    ? ::funnel::avx512::name      \
                                                  : ::funnel::avx2::name)

namespace funnel {

// The rows of a tile as the product reads them, group by group: values [groups, rows, kGroup], scales [groups, rows].
// So a block of rows finds its values side by side in the cache, however many input features there are.
struct QuantizedRows {
  void* values;
  float* scales;
};

// Bytes that the values of a row take.
FUNNEL_KERNEL(int64_t, quantized_bytes, int64_t in_features)

// Rows [first, end) of a tile's x [rows, in_features], float32 or bfloat16. A group with a value that is not finite
// gets a scale that is not.
FUNNEL_KERNEL(void, quantize, const void* x, bool is_bfloat16, int64_t first, int64_t end, int64_t rows,
              int64_t in_features, QuantizedRows to)

// tile [rows, units * kUnit] = x times `units` packed units, as multiply_float32 in product_kernels.h.
FUNNEL_KERNEL(void, multiply_int8, QuantizedRows x, int64_t rows, int64_t in_features, const void* weights,
              int64_t units, const void* next, float* tile)

namespace avx512_vnni {

// What follows the product of one group with another kernel: tile [rows, kUnit] += (sums + the offsets of the group)
// times the scales of x, and with the last group, the whole times the scales of the weights. sums: [rows, kUnit]; the
// tile is not read for group 0, and has `tile_stride` elements from row to row.
void add_group(const int32_t* sums, const QuantizedRows& x, int64_t rows, int64_t in_features, int64_t group,
               const void* unit, float* tile, int64_t tile_stride);

}  // namespace avx512_vnni
}  // namespace funnel
