// What is done to whole rows: the norm, and what comes before it in the same pass over memory.
//
// A row is read from memory once: while its sum of squares is made it comes into the core's cache, and the second look
// at it finds it there. All arithmetic is float32. The norm is Gemma's RMSNorm, row / sqrt(mean(row^2) + eps) * factor
// with factor = 1 + weight, which `make_factor` prepares for all rows.
//
// Elements named `void` are bfloat16 if told so and else float32. Arrays are dense, `width` elements from row to row.
#pragma once

#include <stdint.h>

#include "instruction_set.h"

namespace funnel {

struct Norm {
  const void* x;        // [rows, width]
  const float* factor;  // [width]
  void* normed;         // [rows, width], as x
  int64_t width;
  float eps;
  bool is_bfloat16;
};

struct AddNorm {
  const void* x;               // [rows, width]
  const void* update;          // [rows, width]
  const float* update_factor;  // [width] of a norm of the update, or null
  const float* factor;         // [width]
  void* sum;                   // [rows, width], as x
  void* normed;                // [rows, width], as x; the norm of the sum after it was rounded
  int64_t width;
  float eps;
  bool is_bfloat16, update_is_bfloat16;
};

enum class Pool { max, mean, first };

struct PoolNorm {
  const void* x;        // [windows * stride, width]
  const uint8_t* real;  // [windows * stride]; rows where it is 0 are never read
  const float* factor;  // [width]
  void* pooled;         // [windows, width], as x; 0 where no row of the window is real
  void* normed;         // [windows, width], as x; the norm of the pooled row before it was rounded
  int64_t width, stride;
  Pool pool;
  float eps;
  bool is_bfloat16;
};

enum class Mode { tile, sum, mean, max };

struct RecoverNorm {
  const void* short_rows;  // [windows, width]
  const void* full;        // [windows * stride, width]; null with `tile`
  const float* factor;     // [width]
  void* out;               // [windows * stride, width], as short_rows
  int64_t width, stride;
  Mode mode;
  bool after_norm;  // both operands are normalised, and then combined
  float eps;
  bool is_bfloat16, full_is_bfloat16;
};

FUNNEL_KERNEL(void, make_factor, const void* weight, bool is_bfloat16, int64_t width, float* factor)

// Rows, or windows, `begin` to `end` of what the arguments describe.
FUNNEL_KERNEL(void, norm, const Norm& all, int64_t begin, int64_t end)
FUNNEL_KERNEL(void, add_norm, const AddNorm& all, int64_t begin, int64_t end)
FUNNEL_KERNEL(void, pool_norm, const PoolNorm& all, int64_t begin, int64_t end)
FUNNEL_KERNEL(void, recover_norm, const RecoverNorm& all, int64_t begin, int64_t end)

}  // namespace funnel
