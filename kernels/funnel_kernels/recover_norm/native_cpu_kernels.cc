#include "recover_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

struct Mean {
  Floats operator()(Floats a, Floats b) const { return (a + b) * 0.5f; }
};

template <typename Element, typename Full, typename Combine>
void combine_norm_as(const RecoverNorm& call, int64_t begin, int64_t end, Combine combine) {
  const int64_t width = call.width;
  for (int64_t window = begin; window < end; ++window) {
    const auto tiled = columns_of(static_cast<const Element*>(call.short_rows) + window * width);
    const float tiled_inverse = call.after_norm ? inverse_rms(width, call.eps, tiled) : 1;
    for (int64_t row = window * call.stride; row < (window + 1) * call.stride; ++row) {
      const auto full = columns_of(static_cast<const Full*>(call.full) + row * width);
      Element* out = static_cast<Element*>(call.out) + row * width;
      if (call.after_norm) {
        const float full_inverse = inverse_rms(width, call.eps, full);
        store_row(out, width, [=](int64_t j, int64_t count) {
          const Floats factor = load_some(call.factor + j, count);
          return combine(tiled(j, count) * tiled_inverse * factor, full(j, count) * full_inverse * factor);
        });
      } else {
        const auto combined = [=](int64_t j, int64_t count) { return combine(tiled(j, count), full(j, count)); };
        store_normed(out, width, inverse_rms(width, call.eps, combined), call.factor, combined);
      }
    }
  }
}

// A row is normalised once for its whole window, since nothing is combined with it.
template <typename Element>
void tile_norm_as(const RecoverNorm& call, int64_t begin, int64_t end) {
  for (int64_t window = begin; window < end; ++window) {
    const auto tiled = columns_of(static_cast<const Element*>(call.short_rows) + window * call.width);
    const float inverse = inverse_rms(call.width, call.eps, tiled);
    for (int64_t row = window * call.stride; row < (window + 1) * call.stride; ++row) {
      store_normed(static_cast<Element*>(call.out) + row * call.width, call.width, inverse, call.factor, tiled);
    }
  }
}

template <typename Element, typename Full>
void recover_norm_as(const RecoverNorm& call, int64_t begin, int64_t end) {
  switch (call.mode) {
    case Mode::tile:
      return tile_norm_as<Element>(call, begin, end);
    case Mode::sum:
      return combine_norm_as<Element, Full>(call, begin, end, Sum{});
    case Mode::mean:
      return combine_norm_as<Element, Full>(call, begin, end, Mean{});
    case Mode::max:
      return combine_norm_as<Element, Full>(call, begin, end, Maximum{});
  }
}

}  // namespace

void recover_norm(const RecoverNorm& call, int64_t begin, int64_t end) {
  choose(call.is_bfloat16, [&](auto element) {
    choose(call.full_is_bfloat16,
           [&](auto full) { recover_norm_as<decltype(element), decltype(full)>(call, begin, end); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
