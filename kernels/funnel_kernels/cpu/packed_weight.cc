#include "cpu/packed_weight.h"

#include <algorithm>
#include <cstring>

namespace funnel {
namespace {

// Words of `rows` rows, each `row_bytes` long, into a unit. A cache line of a row is read once, and written to the same
// few lines of the unit as those of the other rows.
void pack_words(const char* weight, int64_t rows, int64_t row_bytes, int64_t words, uint32_t* unit) {
  for (int64_t first = 0; first < words; first += kWordBlock) {
    for (int64_t row = 0; row < kUnit; ++row) {
      uint32_t block[kWordBlock] = {};
      if (row < rows && first * 4 < row_bytes) {
        std::memcpy(block, weight + row * row_bytes + first * 4, std::min(row_bytes - first * 4, kWordBlock * 4));
      }
      for (int64_t i = 0; i < kWordBlock; ++i) unit[(first + i) * kUnit + row] = block[i];
    }
  }
}

// The kernels multiply with x + 128, which is not negative, so each group's sum is too large by 128 times this one.
void pack_scales(const int8_t* weight, const float* scales, int64_t rows, int64_t in_features, char* end_of_words) {
  auto* scale = reinterpret_cast<float*>(end_of_words);
  auto* offsets = reinterpret_cast<int32_t*>(scale + kUnit);
  for (int64_t row = 0; row < kUnit; ++row) scale[row] = row < rows ? scales[row] : 0.0f;
  for (int64_t group = 0; group < groups_of(in_features); ++group) {
    const int64_t first = group * kGroup, end = std::min(first + kGroup, in_features);
    for (int64_t row = 0; row < kUnit; ++row) {
      int32_t sum = 0;
      for (int64_t i = first; row < rows && i < end; ++i) sum += weight[row * in_features + i];
      offsets[group * kUnit + row] = -128 * sum;
    }
  }
}

}  // namespace

void pack(const void* weight, const float* scales, int64_t out_features, int64_t in_features, Dtype dtype,
          void* packed) {
  const int64_t row_bytes = in_features * bytes_of(dtype), words = words_of(in_features, dtype);
  for (int64_t first = 0; first < out_features; first += kUnit) {
    const char* from = static_cast<const char*>(weight) + first * row_bytes;
    char* unit = static_cast<char*>(packed) + first / kUnit * unit_bytes(in_features, dtype);
    const int64_t rows = std::min(kUnit, out_features - first);
    pack_words(from, rows, row_bytes, words, reinterpret_cast<uint32_t*>(unit));
    if (dtype == Dtype::int8) {
      pack_scales(reinterpret_cast<const int8_t*>(from), scales + first, rows, in_features, unit + words * kUnit * 4);
    }
  }
}

}  // namespace funnel
