// The kernel of `post_norm`: a sum of rows and its LayerNorm, in one pass over memory, in float32.
//
// Elements named `void` are bfloat16 if told so and else float32. Arrays are dense, `width` elements from row to row.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

struct PostNorm {
  const void* x;        // [rows, width]
  const void* update;   // [rows, width], or null
  const float* factor;  // [width]
  const float* added;   // [width], after the factor
  void* normed;         // [rows, width], as x
  int64_t width;
  float eps;
  bool is_bfloat16, update_is_bfloat16;
};

// Rows `begin` to `end` of what the arguments describe.
FUNNEL_KERNEL(void, post_norm, const PostNorm& call, int64_t begin, int64_t end)

}  // namespace funnel
