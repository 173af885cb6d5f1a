// Vectors of floats, for sources that are compiled once for each instruction set (see instruction_set.h).
//
// GCC's and clang's vector types do the arithmetic: `a * b + c` is one fused operation (-ffp-contract=fast). bfloat16
// is stored as the upper half of a float.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#ifdef __AVX512F__
#define FUNNEL_LANES 16
#else
#define FUNNEL_LANES 8
#endif

namespace funnel::FUNNEL_INSTRUCTION_SET {

constexpr int kLanes = FUNNEL_LANES;

typedef float Floats __attribute__((vector_size(4 * FUNNEL_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * FUNNEL_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * FUNNEL_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * FUNNEL_LANES)));
// The same in memory, where they need not be aligned.
typedef float FloatsAt __attribute__((vector_size(4 * FUNNEL_LANES), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(2 * FUNNEL_LANES), aligned(2), may_alias));

struct Bfloat16 {
  uint16_t bits;
};

static inline Floats broadcast(float value) { return Floats{} + value; }
// b if one of them is NaN. With intrinsics, because GCC 12 makes a comparison and a blend of a > b ? a : b.
#ifdef __AVX512F__
static inline Floats maximum(Floats a, Floats b) { return (Floats)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b); }
static inline Floats minimum(Floats a, Floats b) { return (Floats)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b); }
#else
static inline Floats maximum(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Floats minimum(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
#endif
// a * b + c, always one operation: GCC makes two of the expression where a branch is between product and sum.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

static inline Floats load(const float* from) { return *reinterpret_cast<const FloatsAt*>(from); }
// With intrinsics, because GCC 12 makes five instructions of the one that widens, and more of those that narrow.
static inline Floats load(const Bfloat16* from) {
#ifdef __AVX512F__
  const Words wide = (Words)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  const Words wide = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  return (Floats)(wide << 16);
}

static inline void store(float* to, Floats value) { *reinterpret_cast<FloatsAt*>(to) = value; }
// Rounds to nearest, ties to even. NaN stays NaN.
static inline void store(Bfloat16* to, Floats value) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
  *reinterpret_cast<HalvesAt*>(to) = (Halves)rounded;
#else
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Words upper = value == value ? rounded : quiet;
#ifdef __AVX512F__
  *reinterpret_cast<HalvesAt*>(to) = (Halves)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)upper);
#else  // packs within each half of the register, then brings the two results together
  const __m256i packed = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
  *reinterpret_cast<HalvesAt*>(to) = (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#endif
#endif
}

// The first `count` elements, for the end of a row; the other lanes are 0 when loaded, and left alone when stored.
template <typename Element>
static inline Floats load_some(const Element* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Element part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load(part);
}
template <typename Element>
static inline void store_some(Element* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  Element part[kLanes];
  store(part, value);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

// Calls function with a value of the element type that a flag stands for.
template <typename Function>
static inline void choose(bool is_bfloat16, const Function& function) {
  if (is_bfloat16) {
    function(Bfloat16{});
  } else {
    function(0.0f);
  }
}

// e^x to a unit in the last place; below -87 the result is 0, above 88 that of 88.
//
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite 1980: ln 2 in two parts), e^r by a polynomial of degree 6, 2^n
// put into the exponent. The polynomial begins as the Taylor series, 1 + r + r^2 / 2; the other coefficients make its
// largest relative error least, 2^-28.
static inline Floats exponential(Floats x) {
  const Floats clamped = minimum(x, broadcast(88.0f));
  const Floats shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.38637563e-3f + 8.36750958e-3f;
  p = p * r + 4.16672379e-2f;
  p = p * r + 1.66665345e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats result = p * (Floats)power;
  return x < -87.0f ? Floats{} : result;
}

// tanh(x) = 1 - 2 / (e^2x + 1), to 2e-7 absolute.
static inline Floats hyperbolic_tangent(Floats x) {
  const Floats clamped = maximum(minimum(x, broadcast(20.0f)), broadcast(-20.0f));
  return 1.0f - 2.0f / (exponential(2.0f * clamped) + 1.0f);
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
