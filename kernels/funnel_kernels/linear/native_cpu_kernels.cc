#include "linear/native_cpu_kernels.h"

#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) = x / (1 + e^-2u) with u the argument of tanh.
Floats gelu(Floats x) {
  const Floats twice_u = x * (x * x * (2 * 0.7978845608f * 0.044715f) + 2 * 0.7978845608f);
  const Floats result = x / (1.0f + exponential(-twice_u));
  return twice_u < -88.0f ? Floats{} : result;  // where the exponential would overflow
}

Floats silu(Floats x) {
  const Floats result = x / (1.0f + exponential(-x));
  return x < -88.0f ? Floats{} : result;  // where the exponential would overflow
}

// Functions as types, so that they are inlined.
struct Identity {
  Floats operator()(Floats x) const { return x; }
};
struct Gelu {
  Floats operator()(Floats x) const { return gelu(x); }
};
struct Silu {
  Floats operator()(Floats x) const { return silu(x); }
};

template <typename Activate, typename Add, typename Out>
void store_product_as(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns, const Add* add, Out* out,
                      int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, tile += tile_stride, out += stride) {
    const Add* added = add == nullptr ? nullptr : add + i * stride;
    store_row(out, columns, [=](int64_t j, int64_t count) {
      const Floats value = Activate()(load_some(tile + j, count));
      return added == nullptr ? value : value + load_some(added + j, count);
    });
  }
}

template <typename Activate, typename Up, typename Out>
void store_gated_as(const float* gate, int64_t tile_stride, const Up* up, int64_t up_stride, int64_t rows,
                    int64_t columns, Out* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, gate += tile_stride, up += up_stride, out += stride) {
    store_row(out, columns, [&](int64_t j, int64_t count) {
      return Activate()(load_some(gate + j, count)) * load_some(up + j, count);
    });
  }
}

template <typename Out, typename Value>
void store_head(Out* out, int64_t half, const float* cos, const float* sin, Value value_at) {
  if (cos == nullptr) return store_row(out, 2 * half, value_at);
  const auto cosines = columns_of(cos), sines = columns_of(sin);
  store_row(out, half, [=](int64_t j, int64_t count) {
    return value_at(j, count) * cosines(j, count) - value_at(half + j, count) * sines(j, count);
  });
  store_row(out + half, half, [=](int64_t j, int64_t count) {
    return value_at(half + j, count) * cosines(j, count) + value_at(j, count) * sines(j, count);
  });
}

template <typename Out>
void store_heads_as(const float* tile, int64_t tile_stride, int64_t rows, int64_t head_dim, const float* factor,
                    float eps, const float* cos, const float* sin, Out* out, int64_t stride) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < rows; ++i, tile += tile_stride, out += stride) {
    const auto head = columns_of(tile);
    const float* row_cos = cos ? cos + i * half : nullptr;
    const float* row_sin = sin ? sin + i * half : nullptr;
    if (factor == nullptr) {
      store_head(out, half, row_cos, row_sin, head);
    } else {
      const float inverse = inverse_rms(head_dim, eps, head);
      store_head(out, half, row_cos, row_sin,
                 [=](int64_t j, int64_t count) { return head(j, count) * inverse * load_some(factor + j, count); });
    }
  }
}

}  // namespace

void store_product(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns, Activation activation,
                   const void* add, bool add_is_bfloat16, void* out, bool out_is_bfloat16, int64_t stride) {
  choose(add_is_bfloat16, [&](auto add_element) {
    choose(out_is_bfloat16, [&](auto out_element) {
      auto* from = static_cast<const decltype(add_element)*>(add);
      auto* to = static_cast<decltype(out_element)*>(out);
      if (activation == Activation::none) {
        store_product_as<Identity>(tile, tile_stride, rows, columns, from, to, stride);
      } else if (activation == Activation::silu) {
        store_product_as<Silu>(tile, tile_stride, rows, columns, from, to, stride);
      } else {
        store_product_as<Gelu>(tile, tile_stride, rows, columns, from, to, stride);
      }
    });
  });
}

void store_gated(const float* gate, int64_t tile_stride, const void* up, bool up_is_bfloat16, int64_t up_stride,
                 int64_t rows, int64_t columns, Activation activation, void* out, bool out_is_bfloat16,
                 int64_t stride) {
  choose(up_is_bfloat16, [&](auto up_element) {
    choose(out_is_bfloat16, [&](auto out_element) {
      auto* from = static_cast<const decltype(up_element)*>(up);
      auto* to = static_cast<decltype(out_element)*>(out);
      if (activation == Activation::silu) {
        store_gated_as<Silu>(gate, tile_stride, from, up_stride, rows, columns, to, stride);
      } else {
        store_gated_as<Gelu>(gate, tile_stride, from, up_stride, rows, columns, to, stride);
      }
    });
  });
}

void store_heads(const float* tile, int64_t tile_stride, int64_t rows, int64_t head_dim, const float* factor, float eps,
                 const float* cos, const float* sin, void* out, bool out_is_bfloat16, int64_t stride) {
  choose(out_is_bfloat16, [&](auto out_element) {
    store_heads_as(tile, tile_stride, rows, head_dim, factor, eps, cos, sin, static_cast<decltype(out_element)*>(out),
                   stride);
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
