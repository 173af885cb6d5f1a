#include "rows_kernels.h"

#include "row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

template <typename Element, typename Value>
void store_normed(Element* to, int64_t width, float inverse, const float* factor, Value value_at) {
  store_row(to, width,
            [=](int64_t j, int64_t count) { return value_at(j, count) * inverse * load_some(factor + j, count); });
}

// Functions as types, so that they are inlined.
struct Sum {
  Floats operator()(Floats a, Floats b) const { return a + b; }
};
struct Mean {
  Floats operator()(Floats a, Floats b) const { return (a + b) * 0.5f; }
};
struct Maximum {
  Floats operator()(Floats a, Floats b) const { return maximum(a, b); }
};

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

void make_factor(const void* weight, bool is_bfloat16, int64_t width, float* factor) {
  choose(is_bfloat16, [&](auto element) {
    const auto columns = columns_of(static_cast<const decltype(element)*>(weight));
    store_row(factor, width, [=](int64_t j, int64_t count) { return 1.0f + columns(j, count); });
  });
}

void norm(const Norm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) { norm_as<decltype(element)>(all, begin, end); });
}

void add_norm(const AddNorm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) {
    choose(all.update_is_bfloat16,
           [&](auto update) { add_norm_as<decltype(element), decltype(update)>(all, begin, end); });
  });
}

void pool_norm(const PoolNorm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) { pool_norm_as<decltype(element)>(all, begin, end); });
}

void recover_norm(const RecoverNorm& all, int64_t begin, int64_t end) {
  choose(all.is_bfloat16, [&](auto element) {
    choose(all.full_is_bfloat16,
           [&](auto full) { recover_norm_as<decltype(element), decltype(full)>(all, begin, end); });
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
