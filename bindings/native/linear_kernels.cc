#include "linear_kernels.h"

#include "simd.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) = x / (1 + e^-2u) with u the argument of tanh.
Floats gelu(Floats x) {
  const Floats twice_u = x * (x * x * (2 * 0.7978845608f * 0.044715f) + 2 * 0.7978845608f);
  const Floats result = x / (1.0f + exponential(-twice_u));
  return twice_u < -88.0f ? Floats{} : result;  // where the exponential would overflow
}

template <typename Out, typename Value>
void store_row(Out* out, int64_t columns, const Value& value_at) {
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) store(out + j, value_at(j, kLanes));
  if (j < columns) store_some(out + j, value_at(j, columns - j), columns - j);
}

template <typename Add, typename Out>
void store_product_as(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns, const Add* add, Out* out,
                      int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, tile += tile_stride, out += stride) {
    if (add == nullptr) {
      store_row(out, columns, [&](int64_t j, int64_t count) { return load_some(tile + j, count); });
    } else {
      const Add* row = add + i * stride;
      store_row(out, columns,
                [&](int64_t j, int64_t count) { return load_some(tile + j, count) + load_some(row + j, count); });
    }
  }
}

template <typename Out>
void store_gated_as(const float* gate, const float* up, int64_t tile_stride, int64_t rows, int64_t columns, Out* out,
                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, gate += tile_stride, up += tile_stride, out += stride) {
    store_row(out, columns, [&](int64_t j, int64_t count) {
      return gelu(load_some(gate + j, count)) * load_some(up + j, count);
    });
  }
}

}  // namespace

void store_product(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns, const void* add,
                   bool add_is_bfloat16, void* out, bool out_is_bfloat16, int64_t stride) {
  choose(add_is_bfloat16, [&](auto add_element) {
    choose(out_is_bfloat16, [&](auto out_element) {
      store_product_as(tile, tile_stride, rows, columns, static_cast<const decltype(add_element)*>(add),
                       static_cast<decltype(out_element)*>(out), stride);
    });
  });
}

void store_gated(const float* gate, const float* up, int64_t tile_stride, int64_t rows, int64_t columns, void* out,
                 bool out_is_bfloat16, int64_t stride) {
  choose(out_is_bfloat16, [&](auto out_element) {
    store_gated_as(gate, up, tile_stride, rows, columns, static_cast<decltype(out_element)*>(out), stride);
  });
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
