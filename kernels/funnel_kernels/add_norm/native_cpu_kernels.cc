#include "add_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

template <typename Element>
void norm_as(const Norm& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto x = columns_of(static_cast<const Element*>(call.x) + row * call.width);
    store_normed(static_cast<Element*>(call.normed) + row * call.width, call.width,
                 inverse_rms(call.width, call.eps, x), call.factor, x);
  }
}

template <typename Element, typename Update>
void add_norm_as(const AddNorm& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const float scale = call.scale;
  for (int64_t row = begin; row < end; ++row) {
    const auto x = columns_of(static_cast<const Element*>(call.x) + row * width);
    const auto update = columns_of(static_cast<const Update*>(call.update) + row * width);
    Element* sum = static_cast<Element*>(call.sum) + row * width;
    if (call.update_factor == nullptr) {
      store_row(sum, width, [=](int64_t j, int64_t count) { return (x(j, count) + update(j, count)) * scale; });
    } else {
      const float inverse = inverse_rms(width, call.eps, update);
      store_row(sum, width, [=](int64_t j, int64_t count) {
        return (x(j, count) + update(j, count) * inverse * load_some(call.update_factor + j, count)) * scale;
      });
    }
    const auto rounded = columns_of<Element>(sum);
    store_normed(static_cast<Element*>(call.normed) + row * width, width, inverse_rms(width, call.eps, rounded),
                 call.factor, rounded);
  }
}

}  // namespace

void norm(const Norm& call, int64_t begin, int64_t end) {
  choose(call.is_bfloat16, [&](auto element) { norm_as<decltype(element)>(call, begin, end); });
}

void add_norm(const AddNorm& call, int64_t begin, int64_t end) {
  choose(call.is_bfloat16, [&](auto element) {
    choose(call.update_is_bfloat16,
           [&](auto update) { add_norm_as<decltype(element), decltype(update)>(call, begin, end); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
