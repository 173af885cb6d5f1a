#include "pool_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// The pooled row is computed twice, for its sum of squares and for its norm. The second time its window is in the
// cache, so a buffer for its float32 values would gain nothing.
template <typename Element, typename Pooled>
void store_pooled(const PoolNorm& call, int64_t window, Pooled pooled_at) {
  Element* pooled = static_cast<Element*>(call.pooled) + window * call.width;
  const float inverse = inverse_rms(call.width, call.eps, [=](int64_t j, int64_t count) {
    const Floats value = pooled_at(j, count);
    store_some(pooled + j, value, count);
    return value;
  });
  store_normed(static_cast<Element*>(call.normed) + window * call.width, call.width, inverse, call.factor, pooled_at);
}

template <typename Element>
void pool_norm_as(const PoolNorm& call, int64_t begin, int64_t end) {
  const int64_t width = call.width, stride = call.stride;
  for (int64_t window = begin; window < end; ++window) {
    const Element* rows = static_cast<const Element*>(call.x) + window * stride * width;
    const uint8_t* real = call.real + window * stride;
    int64_t first = 0, count_real = 0;
    while (first < stride && !real[first]) ++first;
    for (int64_t row = first; row < stride; ++row) count_real += real[row] != 0;
    // Combines the real rows of a window from the first on: combine(result so far, row).
    const auto over_rows = [=](int64_t j, int64_t count, auto combine) {
      Floats value = load_some(rows + first * width + j, count);
      for (int64_t row = first + 1; row < stride; ++row) {
        if (real[row]) value = combine(value, load_some(rows + row * width + j, count));
      }
      return value;
    };
    if (count_real == 0) {
      store_pooled<Element>(call, window, [](int64_t, int64_t) { return Floats{}; });
    } else if (call.pool == Pool::first) {
      store_pooled<Element>(call, window, columns_of(rows + first * width));
    } else if (call.pool == Pool::max) {
      store_pooled<Element>(call, window, [=](int64_t j, int64_t count) { return over_rows(j, count, Maximum{}); });
    } else {
      const float divisor = static_cast<float>(count_real);
      store_pooled<Element>(call, window,
                            [=](int64_t j, int64_t count) { return over_rows(j, count, Sum{}) / divisor; });
    }
  }
}

}  // namespace

void pool_norm(const PoolNorm& call, int64_t begin, int64_t end) {
  choose(call.is_bfloat16, [&](auto element) { pool_norm_as<decltype(element)>(call, begin, end); });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
