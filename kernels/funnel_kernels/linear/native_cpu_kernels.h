// The operations that follow a matrix product while its tile is still in the cache.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

// The activations, in the order of ACTIVATIONS in __init__.py: the tanh approximation of gelu (arXiv:1606.08415), and
// x * sigmoid(x).
enum class Activation { none = -1, gelu_tanh, silu };
constexpr int64_t kActivations = 2;

// out = activation(tile) + add, rounded to the dtype of out.
//
// tile: [rows, columns] float32, `tile_stride` elements from row to row. add: the shape of tile or null, out: the same
// shape; both with `stride` elements from row to row, bfloat16 if told so and else float32.
FUNNEL_KERNEL(void, store_product, const float* tile, int64_t tile_stride, int64_t rows, int64_t columns,
              Activation activation, const void* add, bool add_is_bfloat16, void* out, bool out_is_bfloat16,
              int64_t stride)

// out = activation(gate) * up in float32, rounded once; shapes and strides as in store_product. up has `up_stride`
// elements from row to row; it is bfloat16 if told so and else float32.
FUNNEL_KERNEL(void, store_gated, const float* gate, int64_t tile_stride, const void* up, bool up_is_bfloat16,
              int64_t up_stride, int64_t rows, int64_t columns, Activation activation, void* out, bool out_is_bfloat16,
              int64_t stride)

// One attention head of each row: its RMSNorm with `factor` [head_dim], unless that is null, then RoPE, which turns the
// pairs (j, j + head_dim / 2) by the angles whose cosines and sines are cos, sin [rows, head_dim / 2], unless those are
// null; in float32 and rounded once. tile: [rows, head_dim]; out likewise, `stride` elements from row to row.
FUNNEL_KERNEL(void, store_heads, const float* tile, int64_t tile_stride, int64_t rows, int64_t head_dim,
              const float* factor, float eps, const float* cos, const float* sin, void* out, bool out_is_bfloat16,
              int64_t stride)

}  // namespace funnel
