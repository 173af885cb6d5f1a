// How weights lie in memory, packed: the layout that every product reads, our own kernels' and oneDNN's.
//
// A weight [out_features, in_features] is cut into units of kUnit output features; the last one is filled up with
// zeros. A word, 4 bytes, holds neighbouring input features of one output feature: one float32, two bfloat16 or four
// int8. A unit is [words, kUnit]: the first word of every output feature, then the second of every one, and so on. The
// number of words is a multiple of kWordBlock, again with zeros, so that oneDNN can read a unit (its tags BA16a64b2a,
// BA16a64b4a). After the words, a unit of int8 has what its sums are multiplied with and what is added to them:
// float32 scales [kUnit] and int32 offsets [groups, kUnit], see product_int8.h.
#pragma once

#include <stdint.h>

namespace funnel {

constexpr int64_t kUnit = 64;       // output features that are packed together
constexpr int64_t kWordBlock = 16;  // the number of words is a multiple of it
constexpr int64_t kGroup = 128;     // input features of a row of x that share a scale, where weights are int8

// The functions are static: sources that are compiled for several instruction sets read this header too.
enum class Dtype { float32, bfloat16, int8 };

static constexpr int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : dtype == Dtype::bfloat16 ? 2 : 1;
}

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

static constexpr int64_t units_of(int64_t features) { return (features + kUnit - 1) / kUnit; }

static constexpr int64_t groups_of(int64_t in_features) { return (in_features + kGroup - 1) / kGroup; }

// Words of one output feature.
static constexpr int64_t words_of(int64_t in_features, Dtype dtype) {
  return round_up(in_features * bytes_of(dtype), 4 * kWordBlock) / 4;
}

static constexpr int64_t unit_bytes(int64_t in_features, Dtype dtype) {
  const int64_t words = words_of(in_features, dtype) * kUnit * 4;
  return dtype == Dtype::int8 ? words + (1 + groups_of(in_features)) * kUnit * 4 : words;
}

// Elements of the weight's dtype that a packed weight takes.
static constexpr int64_t packed_size(int64_t out_features, int64_t in_features, Dtype dtype) {
  return units_of(out_features) * unit_bytes(in_features, dtype) / bytes_of(dtype);
}

// Packs a weight whose rows lie one after another. `scales` [out_features] are those of int8, else null.
void pack(const void* weight, const float* scales, int64_t out_features, int64_t in_features, Dtype dtype,
          void* packed);

}  // namespace funnel
