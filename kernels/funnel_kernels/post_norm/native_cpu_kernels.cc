#include "post_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// The first `count` lanes; the others become 0.
Floats first_lanes(Floats value, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) value[lane] = 0;
  return value;
}

// A row of the sum is computed three times: for its mean, for the variance around it, and for the norm. Only the first
// time does it come from memory.
template <typename Element, typename Total>
void store_centred(const PostNorm& call, int64_t row, Total total_at) {
  const float mean = sum_of(call.width, total_at) / static_cast<float>(call.width);
  const auto centred_at = [=](int64_t j, int64_t count) {
    const Floats centred = total_at(j, count) - mean;
    return count >= kLanes ? centred : first_lanes(centred, count);
  };
  const float inverse = inverse_rms(call.width, call.eps, centred_at);
  const auto factor = columns_of(call.factor), added = columns_of(call.added);
  store_row(static_cast<Element*>(call.normed) + row * call.width, call.width, [=](int64_t j, int64_t count) {
    return centred_at(j, count) * inverse * factor(j, count) + added(j, count);
  });
}

template <typename Element, typename Update>
void post_norm_as(const PostNorm& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto x = columns_of(static_cast<const Element*>(call.x) + row * call.width);
    if (call.update == nullptr) {
      store_centred<Element>(call, row, x);
    } else {
      const auto update = columns_of(static_cast<const Update*>(call.update) + row * call.width);
      store_centred<Element>(call, row, [=](int64_t j, int64_t count) { return x(j, count) + update(j, count); });
    }
  }
}

}  // namespace

void post_norm(const PostNorm& call, int64_t begin, int64_t end) {
  choose(call.is_bfloat16, [&](auto element) {
    choose(call.update_is_bfloat16,
           [&](auto update) { post_norm_as<decltype(element), decltype(update)>(call, begin, end); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
