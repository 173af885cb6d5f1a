#include "add_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

template <typename Element>
void norm_as(const Norm& all, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto x = columns_of(static_cast<const Element*>(all.x) + row * all.width);
    store_normed(static_cast<Element*>(all.normed) + row * all.width, all.width, inverse_rms(all.width, all.eps, x),
                 all.factor, x);
  }
}

template <typename Element, typename Update>
void add_norm_as(const AddNorm& all, int64_t begin, int64_t end) {
  const int64_t width = all.width;
  for (int64_t row = begin; row < end; ++row) {
    const auto x = columns_of(static_cast<const Element*>(all.x) + row * width);
    const auto update = columns_of(static_cast<const Update*>(all.update) + row * width);
    Element* sum = static_cast<Element*>(all.sum) + row * width;
    if (all.update_factor == nullptr) {
      store_row(sum, width, [=](int64_t j, int64_t count) { return x(j, count) + update(j, count); });
    } else {
      const float inverse = inverse_rms(width, all.eps, update);
      store_row(sum, width, [=](int64_t j, int64_t count) {
        return x(j, count) + update(j, count) * inverse * load_some(all.update_factor + j, count);
      });
    }
    const auto rounded = columns_of<Element>(sum);
    store_normed(static_cast<Element*>(all.normed) + row * width, width, inverse_rms(width, all.eps, rounded),
                 all.factor, rounded);
  }
}

}  // namespace

void norm(const Norm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) { norm_as<decltype(element)>(all, begin, end); });
}

void add_norm(const AddNorm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) {
    choose(all.update_is_bfloat16,
           [&](auto update) { add_norm_as<decltype(element), decltype(update)>(all, begin, end); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
