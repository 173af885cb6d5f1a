// What kernels do with one row of a matrix, for sources that are compiled once for each instruction set.
//
// In the functions below, value_at(j, count) is the vector of a row that starts at column j. Only the first `count`
// of its lanes are in the row; the others are 0. Functions are passed and captured by value: a store of bfloat16 could
// change what a reference points to, and every loop would read its pointers anew.
#pragma once

#include "cpu/simd.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {

// Vectors of a row that are summed side by side: an addition takes four cycles, and two can start in each.
constexpr int kSums = 8;

template <typename Value>
static float sum_of(int64_t width, Value value_at) {
  Floats sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Floats{};  // an initializer would be a call that clears memory
  int64_t j = 0;
  for (; j + kSums * kLanes <= width; j += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) sums[i] += value_at(j + i * kLanes, kLanes);
  }
  for (; j < width; j += kLanes) sums[0] += value_at(j, width - j);
  for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[0][lane];
  return sum;
}

template <typename Value>
static float inverse_rms(int64_t width, float eps, Value value_at) {
  const float sum = sum_of(width, [=](int64_t j, int64_t count) {
    const Floats value = value_at(j, count);
    return value * value;
  });
  return 1 / __builtin_sqrtf(sum / static_cast<float>(width) + eps);
}

template <typename Element, typename Value>
static void store_row(Element* to, int64_t width, Value value_at) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(to + j, value_at(j, kLanes));
  if (j < width) store_some(to + j, value_at(j, width - j), width - j);
}

// A row as a function of the column.
template <typename Element>
static auto columns_of(const Element* row) {
  return [row](int64_t j, int64_t count) { return load_some(row + j, count); };
}

// A row times its inverse_rms and the factor of a norm.
template <typename Element, typename Value>
static void store_normed(Element* to, int64_t width, float inverse, const float* factor, Value value_at) {
  store_row(to, width,
            [=](int64_t j, int64_t count) { return value_at(j, count) * inverse * load_some(factor + j, count); });
}

// Functions as types, so that they are inlined.
struct Sum {
  Floats operator()(Floats a, Floats b) const { return a + b; }
};
struct Maximum {
  Floats operator()(Floats a, Floats b) const { return maximum(a, b); }
};

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
