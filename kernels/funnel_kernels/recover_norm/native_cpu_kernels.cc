#include "recover_norm/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

struct Mean {
  Floats operator()(Floats a, Floats b) const { return (a + b) * 0.5f; }
};

template <typename Element, typename Full, typename Combine>
void combine_norm_as(const RecoverNorm& all, int64_t begin, int64_t end, Combine combine) {
  const int64_t width = all.width;
  for (int64_t window = begin; window < end; ++window) {
    const auto tiled = columns_of(static_cast<const Element*>(all.short_rows) + window * width);
    const float tiled_inverse = all.after_norm ? inverse_rms(width, all.eps, tiled) : 1;
    for (int64_t row = window * all.stride; row < (window + 1) * all.stride; ++row) {
      const auto full = columns_of(static_cast<const Full*>(all.full) + row * width);
      Element* out = static_cast<Element*>(all.out) + row * width;
      if (all.after_norm) {
        const float full_inverse = inverse_rms(width, all.eps, full);
        store_row(out, width, [=](int64_t j, int64_t count) {
          const Floats factor = load_some(all.factor + j, count);
          return combine(tiled(j, count) * tiled_inverse * factor, full(j, count) * full_inverse * factor);
        });
      } else {
        const auto combined = [=](int64_t j, int64_t count) { return combine(tiled(j, count), full(j, count)); };
        store_normed(out, width, inverse_rms(width, all.eps, combined), all.factor, combined);
      }
    }
  }
}

// Tiling and norm commute, and there is nothing to combine.
template <typename Element>
void tile_norm_as(const RecoverNorm& all, int64_t begin, int64_t end) {
  for (int64_t window = begin; window < end; ++window) {
    const auto tiled = columns_of(static_cast<const Element*>(all.short_rows) + window * all.width);
    const float inverse = inverse_rms(all.width, all.eps, tiled);
    for (int64_t row = window * all.stride; row < (window + 1) * all.stride; ++row) {
      store_normed(static_cast<Element*>(all.out) + row * all.width, all.width, inverse, all.factor, tiled);
    }
  }
}

template <typename Element, typename Full>
void recover_norm_as(const RecoverNorm& all, int64_t begin, int64_t end) {
  switch (all.mode) {
    case Mode::tile:
      return tile_norm_as<Element>(all, begin, end);
    case Mode::sum:
      return combine_norm_as<Element, Full>(all, begin, end, Sum{});
    case Mode::mean:
      return combine_norm_as<Element, Full>(all, begin, end, Mean{});
    case Mode::max:
      return combine_norm_as<Element, Full>(all, begin, end, Maximum{});
  }
}

}  // namespace

void recover_norm(const RecoverNorm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) {
    choose(all.full_is_bfloat16,
           [&](auto full) { recover_norm_as<decltype(element), decltype(full)>(all, begin, end); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
