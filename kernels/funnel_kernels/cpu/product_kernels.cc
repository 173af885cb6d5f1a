#include "cpu/product_kernels.h"

#include "cpu/packed_weight.h"
#include "cpu/product_blocks.h"
#include "cpu/simd.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// Of columns. With kBlockRows, the sums take 24 of AVX-512's 32 registers, and 12 of AVX2's 16.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kColumns = kVectors * kLanes;
constexpr int64_t kPass = kPanel / kUnit;  // input features whose part of a unit stays in a core's cache
// Up to this many blocks weights are widened in registers for each of them: stores and loads of the panel cost more. On
// Zen 4 a text of 5 tokens is 1.5 times as fast with this, and one of 20 tokens 1.1 times.
constexpr int64_t kMostBlocksInRegisters = 4;

typedef uint32_t WordsAt __attribute__((vector_size(4 * FUNNEL_LANES), aligned(4), may_alias));

template <int kRows>
struct Sums {
  Floats of[kRows][kVectors];

  void begin(bool fresh, const float* tile, int64_t stride) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) of[r][v] = fresh ? Floats{} : load(tile + r * stride + v * kLanes);
    }
  }

  // Adds the product of one input feature: of each row at x, and of its weights.
  void add(const float* x, int64_t x_stride, const Floats (&columns)[kVectors]) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float value = x[r * x_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) of[r][v] += value * columns[v];
    }
  }

  void end(float* tile, int64_t stride) const {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(tile + r * stride + v * kLanes, of[r][v]);
    }
  }
};

// kColumns columns of weights in float32; those of the next feature begin `stride` floats later. With each feature a
// line of `ahead` is fetched.
struct Wide {
  const float* weights;
  int64_t stride;

  template <int kRows>
  void multiply(const float* x, int64_t x_stride, int64_t features, Lines ahead, Sums<kRows>& sums) const {
    const float* from = weights;
#pragma GCC unroll 4
    for (int64_t i = 0; i < features; ++i, from += stride) {
      ahead.fetch();
      Floats columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load(from + v * kLanes);
      sums.add(x + i, x_stride, columns);
    }
  }
};

// The same for weights that are pairs of bfloat16. The first of a pair is the lower half of a word.
struct Narrow {
  const uint32_t* weights;

  template <int kRows>
  void multiply(const float* x, int64_t x_stride, int64_t features, Lines ahead, Sums<kRows>& sums) const {
    const uint32_t* from = weights;
#pragma GCC unroll 2
    for (int64_t i = 0; i < features; i += 2, from += kUnit) {
      ahead.fetch<2>();
      Floats columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = (Floats)(pairs_at(from, v) << 16);
      sums.add(x + i, x_stride, columns);
      if (i + 1 == features) break;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = (Floats)(pairs_at(from, v) & 0xffff0000);
      sums.add(x + i + 1, x_stride, columns);
    }
  }

  static Words pairs_at(const uint32_t* from, int v) { return *reinterpret_cast<const WordsAt*>(from + v * kLanes); }
};

// The rows of a tile, kColumns columns wide.
template <int kRows, typename Weights>
void multiply_rows(const Weights& weights, const float* x, int64_t x_stride, int64_t features, Lines ahead, bool fresh,
                   float* tile, int64_t tile_stride) {
  Sums<kRows> sums;
  sums.begin(fresh, tile, tile_stride);
  weights.multiply(x, x_stride, features, ahead, sums);
  sums.end(tile, tile_stride);
}

// Floats of a panel for each kColumns columns of a unit.
int64_t strip_size(int64_t features) { return divide_up(features, 2) * 2 * kColumns; }

// `features` features of a unit of bfloat16 as float32, [kUnit / kColumns, features, kColumns]: what a block of rows
// reads is one piece of memory, which a first-level cache can contain.
void widen_unit(const uint32_t* pairs, int64_t features, float* panel) {
  for (int64_t i = 0; i < features; i += 2, pairs += kUnit, panel += 2 * kColumns) {
    for (int64_t j = 0; j < kUnit; j += kLanes) {
      const Words pair = *reinterpret_cast<const WordsAt*>(pairs + j);
      float* to = panel + j / kColumns * strip_size(features) + j % kColumns;
      store(to, (Floats)(pair << 16));
      store(to + kColumns, (Floats)(pair & 0xffff0000));
    }
  }
}

}  // namespace

void multiply_float32(const float* x, int64_t rows, int64_t in_features, const void* weights, bool weights_are_bfloat16,
                      int64_t units, const void* next, float* panel, float* tile) {
  const Dtype dtype = weights_are_bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  const int64_t per_word = weights_are_bfloat16 ? 2 : 1;
  const int64_t stride = units * kUnit, unit_words = words_of(in_features, dtype) * kUnit;
  const int64_t passes = divide_up(in_features, kPass), pass = round_up(divide_up(in_features, passes), 2);
  const Blocks blocks(rows);
  const auto words = [&](int64_t unit, int64_t first) {
    return static_cast<const uint32_t*>(weights) + unit * unit_words + first / per_word * kUnit;
  };
  for (int64_t first = 0; first < in_features; first += pass) {
    const int64_t features = smaller(pass, in_features - first);
    for (int64_t unit = 0; unit < units; ++unit) {
      const uint32_t* packed = words(unit, first);
      const uint32_t* following = unit + 1 < units             ? words(unit + 1, first)
                                  : first + pass < in_features ? words(0, first + pass)
                                                               : static_cast<const uint32_t*>(next);
      const bool widened = weights_are_bfloat16 && blocks.count > kMostBlocksInRegisters;
      if (widened) widen_unit(packed, features, panel);
      Ahead ahead(following, features * kUnit * 4 / per_word, blocks.count * (kUnit / kColumns));
      for (int64_t column = 0; column < kUnit; column += kColumns) {
        blocks.for_each([&](auto block_rows, int64_t row) {
          const auto multiply = [&](const auto& part) {
            multiply_rows<block_rows.value>(part, x + row * in_features + first, in_features, features,
                                            ahead.take(features), first == 0,
                                            tile + row * stride + unit * kUnit + column, stride);
          };
          if (weights_are_bfloat16 && !widened) {
            multiply(Narrow{packed + column});
          } else {
            multiply(widened ? Wide{panel + column / kColumns * strip_size(features), kColumns}
                             : Wide{reinterpret_cast<const float*>(packed) + column, kUnit});
          }
        });
      }
    }
  }
}

void add_bias(const float* bias, int64_t rows, int64_t columns, int64_t stride, float* tile) {
  for (int64_t i = 0; i < rows; ++i, tile += stride) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(tile + j, load(tile + j) + load(bias + j));
    if (j < columns) {
      store_some(tile + j, load_some(tile + j, columns - j) + load_some(bias + j, columns - j), columns - j);
    }
  }
}

void widen(const void* bfloat16, int64_t count, float* out) {
  const auto* from = static_cast<const Bfloat16*>(bfloat16);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_some(out + i, load_some(from + i, count - i), count - i);
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
