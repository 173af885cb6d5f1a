// The kernel of `pool_norm`: pooling and the norm that follows, in one pass over memory, in float32.
//
// Elements named `void` are bfloat16 if told so and else float32. Arrays are dense, `width` elements from row to row.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

enum class Pool { max, mean, first };
constexpr const char* kPools[] = {"max", "mean", "first"};

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

// Windows `begin` to `end` of what the arguments describe.
FUNNEL_KERNEL(void, pool_norm, const PoolNorm& call, int64_t begin, int64_t end)

}  // namespace funnel
