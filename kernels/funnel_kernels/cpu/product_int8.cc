#include "cpu/product_int8.h"

#include "cpu/packed_weight.h"
#include "cpu/product_blocks.h"
#include "cpu/simd.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// Of weights. With kBlockRows, 12 vectors of int32 sums and up to 12 of float32 totals stay in registers. On Zen 4
// twice as many sums, with the totals in memory, are 5 % slower: the products that follow wait for many stores in a
// row.
constexpr int kVectors = 2;
constexpr int64_t kPassGroups = 6;  // most in a pass, so that a block's weights stay in a core's first cache
constexpr int64_t kGroupWords = kGroup / 4;
constexpr float kSmallest = 1e-30f;  // as SMALLEST in linear/reference.py

typedef int32_t IntsAt __attribute__((vector_size(4 * FUNNEL_LANES), aligned(4), may_alias));

#ifdef __AVX512VNNI__

typedef uint8_t Value;
typedef uint32_t FourValues __attribute__((aligned(1), may_alias));
constexpr int64_t kColumns = kVectors * kLanes;  // of a unit, multiplied at a time

// Four weights of each of kLanes columns.
static Ints weights_at(const int8_t* from, int v) { return *reinterpret_cast<const IntsAt*>(from + v * kLanes * 4); }

static Ints add_products(Ints sums, FourValues x, Ints weights) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(static_cast<int>(x)), (__m512i)weights);
}

static Ints first_sums(const int32_t* offsets, int v) { return *reinterpret_cast<const IntsAt*>(offsets + v * kLanes); }

// Vector `v` of the columns' sums.
static Ints column_sums(const Ints* sums, int v) { return sums[v]; }

static void store_values(Value* to, Ints values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(-1, (__m512i)(values + 128)));
}

#else

// A product of 16 bits takes two instructions for two features. A vector of sums has two lanes for each column.
typedef int16_t Value;
typedef uint64_t FourValues __attribute__((aligned(2), may_alias));
constexpr int64_t kColumns = kVectors * kLanes / 2;

static Ints weights_at(const int8_t* from, int v) {
  const int8_t* at = from + v * kLanes * 2;
#ifdef __AVX512F__
  return (Ints)_mm512_maskz_cvtepi8_epi16(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#else
  return (Ints)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#endif
}

static Ints add_products(Ints sums, FourValues x, Ints weights) {
#ifdef __AVX512F__
  return sums + (Ints)_mm512_madd_epi16(_mm512_set1_epi64(static_cast<int64_t>(x)), (__m512i)weights);
#else
  return sums + (Ints)_mm256_madd_epi16(_mm256_set1_epi64x(static_cast<int64_t>(x)), (__m256i)weights);
#endif
}

static Ints first_sums(const int32_t*, int) { return Ints{}; }

static Ints column_sums(const Ints* sums, int v) {
  const Ints a = sums[2 * v], b = sums[2 * v + 1];
#ifdef __AVX512F__
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (Ints)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b) +
         (Ints)_mm512_permutex2var_epi32((__m512i)a, odd, (__m512i)b);
#else  // adds pairs within each half of the register, then orders the four quarters
  return (Ints)_mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)a, (__m256i)b), 0xd8);
#endif
}

static void store_values(Value* to, Ints values) {
#ifdef __AVX512F__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(-1, (__m512i)values));
#else  // packs within each half of the register, then brings the two results together
  const __m256i packed = _mm256_packs_epi32((__m256i)values, (__m256i)values);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#endif
}

#endif

constexpr int kFloatVectors = kColumns / kLanes;

static Ints round_to_nearest(Floats x) {
#ifdef __AVX512F__
  return (Ints)_mm512_maskz_cvtps_epi32(-1, (__m512)x);
#else
  return (Ints)_mm256_cvtps_epi32((__m256)x);
#endif
}

// The largest absolute value. As integers, the bits of NaN are above those of every number.
template <typename Element>
float largest(const Element* x, int64_t count) {
  Ints most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Ints bits = (Ints)load_some(x + i, count - i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = most[lane] > result ? most[lane] : result;
  float value;
  __builtin_memcpy(&value, &result, sizeof(value));
  return value;
}

// The groups of a row, in a tile of `rows`.
template <typename Element>
void quantize_row(const Element* x, int64_t in_features, int64_t rows, Value* values, float* scales) {
  for (int64_t first = 0; first < in_features; first += kGroup, values += rows * kGroup, scales += rows) {
    const int64_t count = smaller(kGroup, in_features - first);
    const float most = largest(x + first, count);
    const bool is_zero = most < kSmallest;
    *scales = is_zero ? 0.0f : most / 127.0f;
    const float inverse = is_zero ? 0.0f : 127.0f / most;
    for (int64_t i = 0; i < count; i += kLanes) {
      store_values(values + i, round_to_nearest(load_some(x + first + i, count - i) * inverse));
    }
  }
}

// kColumns columns of kRows rows of x, whose tile has `x_rows`; a pass of input features, `words` times four. With each
// word a line of `ahead` is fetched. The tile is added to, unless the pass is `fresh`, and in the last pass multiplied
// with the `scales` of the columns, which are null before.
template <int kRows>
void multiply_rows(const Value* x, const float* x_scales, int64_t x_rows, int64_t words, const int8_t* weights,
                   const int32_t* offsets, const float* scales, Lines ahead, bool fresh, float* tile,
                   int64_t tile_stride) {
  Floats totals[kRows][kFloatVectors] = {};
  if (!fresh) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kFloatVectors; ++v) totals[r][v] = load(tile + r * tile_stride + v * kLanes);
    }
  }
  for (int64_t first = 0; first < words; first += kGroupWords) {
    Ints sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = first_sums(offsets, v);
    }
    const int64_t group_words = smaller(kGroupWords, words - first);
    for (int64_t i = 0; i < group_words; ++i, weights += kUnit * 4) {
      ahead.fetch();
      Ints columns[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) columns[v] = weights_at(weights, v);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const FourValues four = *reinterpret_cast<const FourValues*>(x + r * kGroup + i * 4);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = add_products(sums[r][v], four, columns[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kFloatVectors; ++v) {
        const Floats sum = __builtin_convertvector(column_sums(sums[r], v), Floats);
        totals[r][v] = multiply_add(sum, broadcast(x_scales[r]), totals[r][v]);
      }
    }
    x += x_rows * kGroup;
    x_scales += x_rows;
    offsets += kUnit;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kFloatVectors; ++v) {
      const Floats total = totals[r][v];
      store(tile + r * tile_stride + v * kLanes, scales ? total * load(scales + v * kLanes) : total);
    }
  }
}

}  // namespace

int64_t quantized_bytes(int64_t in_features) {
  return groups_of(in_features) * kGroup * static_cast<int64_t>(sizeof(Value));
}

void quantize(const void* x, bool is_bfloat16, int64_t first, int64_t end, int64_t rows, int64_t in_features,
              QuantizedRows to) {
  choose(is_bfloat16, [&](auto element) {
    for (int64_t i = first; i < end; ++i) {
      quantize_row(static_cast<const decltype(element)*>(x) + i * in_features, in_features, rows,
                   static_cast<Value*>(to.values) + i * kGroup, to.scales + i);
    }
  });
}

void multiply_int8(QuantizedRows x, int64_t rows, int64_t in_features, const void* weights, int64_t units,
                   const void* next, float* tile) {
  const int64_t words = divide_up(in_features, 4), groups = groups_of(in_features), stride = units * kUnit;
  const int64_t passes = divide_up(groups, kPassGroups), pass = divide_up(groups, passes);
  const int64_t unit_size = unit_bytes(in_features, Dtype::int8),
                all_words = words_of(in_features, Dtype::int8) * kUnit * 4;
  const Blocks blocks(rows);
  const int64_t all_blocks = blocks.count * (kUnit / kColumns);
  const auto packed = [&](int64_t unit, int64_t group) {
    return static_cast<const int8_t*>(weights) + unit * unit_size + group * kGroupWords * kUnit * 4;
  };
  const auto values = [&](int64_t group) { return static_cast<const Value*>(x.values) + group * rows * kGroup; };
  for (int64_t group = 0; group < groups; group += pass) {
    const bool is_last = group + pass >= groups;
    const int64_t pass_words = smaller(pass * kGroupWords, words - group * kGroupWords);
    // The next pass also reads more of x, which is too large for a core's cache where in_features is large.
    const int64_t next_group = smaller(group + pass, groups), next_end = smaller(next_group + pass, groups);
    Ahead ahead_of_x(values(next_group), (next_end - next_group) * rows * kGroup * sizeof(Value), all_blocks);
    for (int64_t unit = 0; unit < units; ++unit) {
      const auto* scales = reinterpret_cast<const float*>(packed(unit, 0) + all_words);
      const auto* offsets = reinterpret_cast<const int32_t*>(scales + kUnit) + group * kUnit;
      const void* following = unit + 1 < units ? packed(unit + 1, group) : is_last ? next : packed(0, next_group);
      Ahead ahead(following, pass_words * kUnit * 4, all_blocks);
      for (int64_t column = 0; column < kUnit; column += kColumns) {
        blocks.for_each([&](auto block_rows, int64_t row) {
          const Lines weights_ahead = ahead.take(pass_words);
          multiply_rows<block_rows.value>(values(group) + row * kGroup, x.scales + group * rows + row, rows, pass_words,
                                          packed(unit, group) + column * 4, offsets + column,
                                          is_last ? scales + column : nullptr,
                                          weights_ahead.step > 0 ? weights_ahead : ahead_of_x.take(pass_words),
                                          group == 0, tile + row * stride + unit * kUnit + column, stride);
        });
      }
    }
  }
}

#ifdef __AVX512VNNI__

void add_group(const int32_t* sums, const QuantizedRows& x, int64_t rows, int64_t in_features, int64_t group,
               const void* unit, float* tile, int64_t tile_stride) {
  const auto* scales =
      reinterpret_cast<const float*>(static_cast<const char*>(unit) + words_of(in_features, Dtype::int8) * kUnit * 4);
  const auto* offsets = reinterpret_cast<const int32_t*>(scales + kUnit) + group * kUnit;
  const bool is_last = group + 1 == groups_of(in_features);
  for (int64_t row = 0; row < rows; ++row, sums += kUnit, tile += tile_stride) {
    const float x_scale = x.scales[group * rows + row];
    for (int64_t j = 0; j < kUnit; j += kLanes) {
      const Ints sum = *reinterpret_cast<const IntsAt*>(sums + j) + *reinterpret_cast<const IntsAt*>(offsets + j);
      const Floats before = group == 0 ? Floats{} : load(tile + j);
      const Floats total = multiply_add(__builtin_convertvector(sum, Floats), broadcast(x_scale), before);
      store(tile + j, is_last ? total * load(scales + j) : total);
    }
  }
}

#endif

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
