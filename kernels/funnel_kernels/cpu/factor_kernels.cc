#include "cpu/factor_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {

void make_factor(const void* weight, bool is_bfloat16, int64_t width, float* factor) {
  choose(is_bfloat16, [&](auto element) {
    const auto columns = columns_of(static_cast<const decltype(element)*>(weight));
    store_row(factor, width, [=](int64_t j, int64_t count) { return 1.0f + columns(j, count); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
