// oneDNN's products of a tile, on packed weights. Where a processor has AMX they are faster than our own kernels.
#pragma once

#include <stdint.h>

#include "cpu/packed_weight.h"
#include "cpu/product_int8.h"

namespace funnel::onednn {

// tile [rows, units * kUnit] float32 = x [rows, in_features] times `units` packed units, both of bfloat16.
void multiply_bfloat16(const void* x, int64_t rows, int64_t in_features, const void* weights, int64_t units,
                       float* tile);

// The same for weights of int8, and x as avx512_vnni::quantize makes it.
void multiply_int8(const QuantizedRows& x, int64_t rows, int64_t in_features, const void* weights, int64_t units,
                   float* tile);

// Generates the code for tiles of this many rows and units, so that the first call does not have to.
void prepare(int64_t rows, int64_t units, int64_t in_features, Dtype weights);

}  // namespace funnel::onednn
