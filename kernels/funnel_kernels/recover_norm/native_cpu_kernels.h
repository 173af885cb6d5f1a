// The kernel of `recover_norm`: tiling, combining and the final norm, in one pass over memory, in float32.
//
// Elements named `void` are bfloat16 if told so and else float32. Arrays are dense, `width` elements from row to row.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

enum class Mode { tile, sum, mean, max };
constexpr const char* kModes[] = {"tile", "sum", "mean", "max"};

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

// Windows `begin` to `end` of what the arguments describe.
FUNNEL_KERNEL(void, recover_norm, const RecoverNorm& call, int64_t begin, int64_t end)

}  // namespace funnel
