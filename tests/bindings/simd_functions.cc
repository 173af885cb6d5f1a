// The functions of cpu/simd.h over arrays, for one instruction set; test_simd.py compiles and calls them.
#include "cpu/simd.h"

namespace simd = funnel::FUNNEL_INSTRUCTION_SET;

template <typename Function>
static void over(const float* x, float* y, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += simd::kLanes) {
    simd::store_some(y + i, function(simd::load_some(x + i, count - i)), count - i);
  }
}

extern "C" void exponential(const float* x, float* y, int64_t count) { over(x, y, count, simd::exponential); }
extern "C" void hyperbolic_tangent(const float* x, float* y, int64_t count) {
  over(x, y, count, simd::hyperbolic_tangent);
}
