#include "pool_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// The pooled row is made twice, for its sum of squares and for its norm, from rows that are then in the cache: a buffer
// for its float32 values would gain nothing.
template <typename Element, typename Pooled>
void store_pooled(const PoolNorm& all, int64_t window, Pooled pooled_at) {
  Element* pooled = static_cast<Element*>(all.pooled) + window * all.width;
  const float inverse = inverse_rms(all.width, all.eps, [=](int64_t j, int64_t count) {
    const Floats value = pooled_at(j, count);
    store_some(pooled + j, value, count);
    return value;
  });
  store_normed(static_cast<Element*>(all.normed) + window * all.width, all.width, inverse, all.factor, pooled_at);
}

template <typename Element>
void pool_norm_as(const PoolNorm& all, int64_t begin, int64_t end) {
  const int64_t width = all.width, stride = all.stride;
  for (int64_t window = begin; window < end; ++window) {
    const Element* rows = static_cast<const Element*>(all.x) + window * stride * width;
    const uint8_t* real = all.real + window * stride;
    int64_t first = 0, count_real = 0;
    while (first < stride && !real[first]) ++first;
    for (int64_t row = first; row < stride; ++row) count_real += real[row] != 0;
    // Calls combine(so far, row) for the real rows after the first, and gives the last.
    const auto over_rows = [=](int64_t j, int64_t count, auto combine) {
      Floats value = load_some(rows + first * width + j, count);
      for (int64_t row = first + 1; row < stride; ++row) {
        if (real[row]) value = combine(value, load_some(rows + row * width + j, count));
      }
      return value;
    };
    if (count_real == 0) {
      store_pooled<Element>(all, window, [](int64_t, int64_t) { return Floats{}; });
    } else if (all.pool == Pool::first) {
      store_pooled<Element>(all, window, columns_of(rows + first * width));
    } else if (all.pool == Pool::max) {
      store_pooled<Element>(all, window, [=](int64_t j, int64_t count) { return over_rows(j, count, Maximum{}); });
    } else {
      const float divisor = static_cast<float>(count_real);
      store_pooled<Element>(all, window, [=](int64_t j, int64_t count) {
        return over_rows(j, count, Sum{}) / divisor;
      });
    }
  }
}

}  // namespace

void pool_norm(const PoolNorm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) { pool_norm_as<decltype(element)>(all, begin, end); });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
