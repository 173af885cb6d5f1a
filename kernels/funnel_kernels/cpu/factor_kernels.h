// The factor of a norm.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

// factor = 1 + weight, both [width]; the weight is bfloat16 if told so and else float32. Gemma's RMSNorm is
// row / sqrt(mean(row^2) + eps) * factor.
FUNNEL_KERNEL(void, make_factor, const void* weight, bool is_bfloat16, int64_t width, float* factor)

}  // namespace funnel
