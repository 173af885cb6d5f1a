// The kernels of `add_norm`: the sum of the residual stream and an update, and the norm that follows, in one pass over
// memory. All arithmetic is float32.
//
// A row is read from memory once: its sum of squares brings it into the core's cache, and the second pass over it finds
// it there. Elements named `void` are bfloat16 if told so and else float32. Arrays are dense, `width` elements from row
// to row.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

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
  float scale;                 // of the sum
  void* sum;                   // [rows, width], as x
  void* normed;                // [rows, width], as x; the norm of the sum after it was rounded
  int64_t width;
  float eps;
  bool is_bfloat16, update_is_bfloat16;
};

// Rows `begin` to `end` of what the arguments describe.
FUNNEL_KERNEL(void, norm, const Norm& call, int64_t begin, int64_t end)
FUNNEL_KERNEL(void, add_norm, const AddNorm& call, int64_t begin, int64_t end)

}  // namespace funnel
