// Scores are queries times keys, the result is weights times values; both products are `multiply`: kRows rows of A, one
// word at a time, times a panel of B that is kPanel columns wide. A word is a float, or two neighbouring bfloat16 of
// the sum where the processor multiplies them in pairs.
//
// A row's softmax is computed block by block, with a running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867;
// FlashAttention, arXiv:2205.14135). Scores are in units of ln 2: weights are powers of two. A key that a row does not
// see adds exactly 0. So a row's result does not depend on the rows that it shares a tile with.
#include "attention/native_cpu_kernels.h"

#include "cpu/simd.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// kRows x 2 vectors of sums, 2 of B and one of A fill the registers: 32 with AVX-512, 16 without.
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int kPanel = 2 * kLanes;
constexpr int64_t kScoreStride = kKeyBlock + kLanes;  // not a multiple of 1 KB, or rows compete for cache lines
constexpr float kLowest = -3e38f;                     // below any score, and finite
static_assert(kKeyStep % kPanel == 0);

// Elements in a word.
#ifdef __AVX512BF16__
template <typename Element>
constexpr int64_t kPerWord = 4 / sizeof(Element);
#else
template <typename Element>
constexpr int64_t kPerWord = 1;
#endif

typedef uint32_t WordsAt __attribute__((vector_size(4 * FUNNEL_LANES), aligned(4), may_alias));
Words load_words(const uint32_t* from) { return *reinterpret_cast<const WordsAt*>(from); }
void store_words(uint32_t* to, Words value) { *reinterpret_cast<WordsAt*>(to) = value; }

int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// -------------------------------------------------------------------------------------------------------- product

template <typename Element>
Floats multiply_add(Words a, Words b, Floats sum) {
#ifdef __AVX512BF16__
  if constexpr (kPerWord<Element> == 2) return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return (Floats)a * (Floats)b + sum;
}

// A (kRows rows of `depth` words, of which word i of row r is a[r * kRowStride + i * kWordStride]) times a panel of B
// [depth, kPanel]. `finish(r, j, sums)` gets the sums of row r from column j on. Not inlined: what the surrounding loop
// keeps in registers would push sums out of them.
template <typename Element, int64_t kRowStride, int64_t kWordStride, typename Finish>
__attribute__((noinline)) void multiply(const uint32_t* a, const uint32_t* b, int64_t depth, const Finish& finish) {
  Floats sums[kRows][2] = {};
  for (int64_t i = 0; i < depth; ++i, a += kWordStride, b += kPanel) {
    const Words left = load_words(b), right = load_words(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Words word = Words{} + a[r * kRowStride];
      sums[r][0] = multiply_add<Element>(word, left, sums[r][0]);
      sums[r][1] = multiply_add<Element>(word, right, sums[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    finish(r, 0, sums[r][0]);
    finish(r, kLanes, sums[r][1]);
  }
}

// -------------------------------------------------------------------------------------------------------- packing

template <typename Element>
int64_t words_of(int64_t elements) {
  return (elements + kPerWord<Element> - 1) / kPerWord<Element>;
}

// Writes the words of a row of `elements`, `stride` words apart; a null row is zeros.
template <typename Element>
void write_words(const Element* row, int64_t elements, uint32_t* to, int64_t stride) {
  const int64_t words = words_of<Element>(elements), whole = row == nullptr ? 0 : elements / kPerWord<Element>;
  for (int64_t i = 0; i < whole; ++i, to += stride) {
    if constexpr (sizeof(Element) * kPerWord<Element> == sizeof *to) {
      __builtin_memcpy(to, row + i * kPerWord<Element>, sizeof *to);
    } else {
      *to = static_cast<uint32_t>(row[i].bits) << 16;  // bfloat16, widened
    }
  }
  for (int64_t i = whole; i < words; ++i, to += stride) {
    *to = 0;
    if (row != nullptr) __builtin_memcpy(to, row + i * kPerWord<Element>, sizeof(Element));  // half a word is left
  }
}

template <typename Element>
int64_t packed_words(const Attention& call) {
  return call.kv_heads * (call.places * words_of<Element>(call.head_dim) +
                          round_up(call.head_dim, kPanel) * words_of<Element>(call.places));
}

// Where the packed keys and values of one head are.
template <typename Element>
struct Packed {
  int64_t depth;      // words of a query or a key
  int64_t columns;    // of the values, filled up with zeros
  int64_t key_words;  // words of the packed keys in a sum over keys
  uint32_t* k;        // [panels of keys, depth, kPanel]
  uint32_t* v;        // [panels of columns, key_words, kPanel]

  Packed(const Attention& call, int64_t kv_head)
      : depth(words_of<Element>(call.head_dim)),
        columns(round_up(call.head_dim, kPanel)),
        key_words(words_of<Element>(call.places)),
        k(call.packed + kv_head * (packed_words<Element>(call) / call.kv_heads)),
        v(k + call.places * depth) {}
};

template <typename Element>
void pack(const Attention& call, int64_t kv_head, int64_t first, int64_t last) {
  const Packed<Element> packed(call, kv_head);
  const auto row_of = [&](const void* array, int64_t place) {
    const int64_t key = call.keys[place];
    return key < 0 ? nullptr : static_cast<const Element*>(array) + (key * call.kv_heads + kv_head) * call.head_dim;
  };
  const auto value_of = [&](int64_t place, int64_t column) {
    const Element* row = row_of(call.v, place);
    return row == nullptr ? Words{} : (Words)load_some(row + column, call.head_dim - column);
  };
  for (int64_t at = first; at < last; ++at) {
    const Element* row = row_of(call.k, at);
    if (row == nullptr) continue;  // no row sees the place: its score, whatever it is, becomes a weight of 0
    write_words(row, call.head_dim, packed.k + round_down(at, kPanel) * packed.depth + at % kPanel, kPanel);
  }
  for (int64_t at = first; at < last; at += kPerWord<Element>) {
    uint32_t* to = packed.v + at / kPerWord<Element> * kPanel;
    for (int64_t column = 0; column < packed.columns; column += kLanes) {
      Words words = value_of(at, column);
      if constexpr (kPerWord<Element> == 2) words = words >> 16 | value_of(at + 1, column);
      store_words(to + round_down(column, kPanel) * packed.key_words + column % kPanel, words);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- softmax

// 2^x for x <= 127; below -126 it is 2^-126, which is negligible beside the largest weight, 1.
//
// x = n + f with |f| <= 1/2, 2^f by the polynomial of degree 5 whose largest relative error is least (2^-23.4), and n
// added to the exponent.
Floats power_of_two(Floats x) {
  const Floats clamped = maximum(x, broadcast(-126.0f));
  const Floats shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer, its low bits are n
  const Floats f = clamped - (shifted - 12582912.0f);
  Floats p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return (Floats)((Words)p + ((Words)shifted << 23));
}

// Combines all lanes, always in the same order.
template <typename Combine>
float over_lanes(Floats value, const Combine& combine) {
#if FUNNEL_LANES == 16
  const auto eight = combine(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7),
                             __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto eight = value;
#endif
  const auto four =
      combine(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  const auto two = combine(__builtin_shufflevector(four, four, 0, 1), __builtin_shufflevector(four, four, 2, 3));
  return combine(two[0], two[1]);
}

template <typename Element>
void store_weights(uint32_t* row, int64_t key, Floats weights) {
  if constexpr (kPerWord<Element> == 2) {
    store(reinterpret_cast<Bfloat16*>(row) + key, weights);
  } else {
    store_words(row + key, (Words)weights);
  }
}

struct Softmax {
  float maximum, sum;
};

// Turns the scores of `count` keys into weights relative to the running maximum. Of the keys, [lo, hi) are visible, at
// least one; the others and those that fill up the last vector get 0. Returns what former sums are multiplied by.
template <typename Element, bool kAllVisible>
float weigh(const float* scores, int64_t count, int64_t lo, int64_t hi, Softmax& softmax, uint32_t* weights) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto where_visible = [&](int64_t key, Floats value, float otherwise) {
    if constexpr (kAllVisible) return value;
    const Words after_lo = (Words)(lane + static_cast<int32_t>(key - lo));  // keys before lo wrap around to large ones
    return after_lo < static_cast<uint32_t>(hi - lo) ? value : broadcast(otherwise);
  };
  Floats highest = broadcast(softmax.maximum);
  for (int64_t key = 0; key < count; key += kLanes) {
    highest = maximum(highest, where_visible(key, load(scores + key), kLowest));
  }
  const float new_maximum = over_lanes(highest, [](auto a, auto b) { return a > b ? a : b; });
  Floats sum = {};
  for (int64_t key = 0; key < count; key += kLanes) {
    const Floats weight = where_visible(key, power_of_two(load(scores + key) - new_maximum), 0.0f);
    sum += weight;
    store_weights<Element>(weights, key, weight);
  }
  const float shrink = power_of_two(broadcast(softmax.maximum - new_maximum))[0];
  softmax = {new_maximum, softmax.sum * shrink + over_lanes(sum, [](auto a, auto b) { return a + b; })};
  return shrink;
}

// ----------------------------------------------------------------------------------------------------------- tile

// A score row is one query head of one query row. A tile works on them in strips of kRows; those that fill up the last
// strip hold zeros and see nothing.
struct Strip {
  int64_t lo[kRows], hi[kRows];  // the places that each row sees
  int64_t first, last;           // the places that any of them sees lie in [first, last)
  Softmax softmax[kRows];
};

template <typename Element>
class Tile {
 public:
  Tile(const Attention& call, int64_t kv_head, int64_t row, int64_t rows, uint32_t* scratch)
      : call_(call),
        packed_(call, kv_head),
        group_(call.heads / call.kv_heads),
        score_rows_(rows * group_),
        strips_(strips_of(call, rows)),
        lo_(call.lo + row),
        hi_(call.hi + row),
        q_(static_cast<const Element*>(call.q) + (row * call.heads + kv_head * group_) * call.head_dim),
        out_(static_cast<Element*>(call.out) + (row * call.heads + kv_head * group_) * call.head_dim) {
    sums_ = reinterpret_cast<float*>(scratch);
    scores_ = sums_ + strips_ * kRows * packed_.columns;
    weights_ = reinterpret_cast<uint32_t*>(scores_ + kRows * kScoreStride);
    queries_ = weights_ + kRows * kWeightStride;
    strip_ = reinterpret_cast<Strip*>(queries_ + round_up(strips_ * kRows * packed_.depth, kLanes));
  }

  static int64_t scratch_words(const Attention& call, int64_t rows) {
    const Packed<Element> packed(call, 0);
    const int64_t rows_of_strips = strips_of(call, rows) * kRows;
    return rows_of_strips * packed.columns + kRows * (kScoreStride + kWeightStride) +
           round_up(rows_of_strips * packed.depth, kLanes) + strips_of(call, rows) * sizeof(Strip) / sizeof(uint32_t);
  }

  void run() {
    int64_t first = call_.places, last = 0;
    for (int64_t s = 0; s < strips_; ++s) {
      start(s);
      first = least(first, strip_[s].first);
      last = greatest(last, strip_[s].last);
    }
    for (const int32_t* block = block_of(first); *block < last; ++block) {
      for (int64_t s = 0; s < strips_; ++s) {
        const int64_t from = greatest(block[0], round_down(strip_[s].first, kPanel));
        const int64_t to = least(block[1], strip_[s].last);
        if (from < to) visit(s, from, to);
      }
    }
    for (int64_t i = 0; i < score_rows_; ++i) write(i);
  }

 private:
  static constexpr int64_t kWeightStride = kScoreStride / kPerWord<Element>;

  static int64_t strips_of(const Attention& call, int64_t rows) {
    return (rows * (call.heads / call.kv_heads) + kRows - 1) / kRows;
  }

  // The start of the block that holds a place, or the end of all blocks.
  const int32_t* block_of(int64_t place) const {
    int64_t low = 0, high = call_.blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (call_.starts[middle + 1] <= place) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return call_.starts + low;
  }

  // Offset of a score row in q and out.
  int64_t offset(int64_t i) const { return (i / group_ * call_.heads + i % group_) * call_.head_dim; }

  float* sums(int64_t s, int64_t column) { return sums_ + (s * packed_.columns + column) * kRows; }

  void start(int64_t s) {
    Strip& strip = strip_[s];
    strip.first = call_.places;
    strip.last = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t i = s * kRows + r;
      const bool real = i < score_rows_;
      strip.lo[r] = real ? lo_[i / group_] : 0;
      strip.hi[r] = real ? hi_[i / group_] : 0;
      if (strip.lo[r] < strip.hi[r]) {
        strip.first = least(strip.first, strip.lo[r]);
        strip.last = greatest(strip.last, strip.hi[r]);
      }
      strip.softmax[r] = {kLowest, 0.0f};
      write_words(real ? q_ + offset(i) : nullptr, call_.head_dim, queries_ + s * packed_.depth * kRows + r, kRows);
    }
    for (int64_t j = 0; j < kRows * packed_.columns; j += kLanes) store(sums(s, 0) + j, Floats{});
  }

  // Adds what the places [from, to), which lie in one block, contribute to a strip; `from` is a multiple of kPanel.
  void visit(int64_t s, int64_t from, int64_t to) {
    Strip& strip = strip_[s];
    const int64_t count = to - from;
    score(queries_ + s * packed_.depth * kRows, from, count);

    float shrink[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const float* scores = scores_ + r * kScoreStride;
      uint32_t* weights = weights_ + r * kWeightStride;
      const int64_t lo = greatest(strip.lo[r] - from, 0), hi = least(strip.hi[r] - from, count);
      if (lo >= hi) {
        shrink[r] = 1.0f;
        for (int64_t key = 0; key < count; key += kLanes) store_weights<Element>(weights, key, Floats{});
      } else if (lo == 0 && hi == count && count % kLanes == 0) {
        shrink[r] = weigh<Element, true>(scores, count, lo, hi, strip.softmax[r], weights);
      } else {
        shrink[r] = weigh<Element, false>(scores, count, lo, hi, strip.softmax[r], weights);
      }
    }

    for (int64_t column = 0; column < packed_.columns; column += kPanel) {
      float* to_sums = sums(s, column);
      multiply<Element, kWeightStride, 1>(weights_,
                                          packed_.v + column * packed_.key_words + from / kPerWord<Element> * kPanel,
                                          words_of<Element>(count), [&](int r, int j, Floats product) {
                                            float* sum = to_sums + r * kPanel + j;
                                            store(sum, load(sum) * shrink[r] + product);
                                          });
    }
  }

  // Scores of a strip's queries and `count` packed keys from `at` on, in units of ln 2.
  void score(const uint32_t* queries, int64_t at, int64_t count) {
    constexpr float kLog2E = 1.44269504f;
    const bool capped = call_.softcap != 0;
    const float factor = capped ? call_.scale / call_.softcap : call_.scale * kLog2E;
    const float cap = call_.softcap * kLog2E;
    for (int64_t key = 0; key < count; key += kPanel) {
      multiply<Element, 1, kRows>(
          queries, packed_.k + (at + key) * packed_.depth, packed_.depth,
          [&](int r, int j, Floats product) { store(scores_ + r * kScoreStride + key + j, product * factor); });
    }
    if (!capped) return;
    for (int64_t r = 0; r < kRows; ++r) {
      for (float* score = scores_ + r * kScoreStride; score < scores_ + r * kScoreStride + count; score += kLanes) {
        store(score, cap * hyperbolic_tangent(load(score)));
      }
    }
  }

  // The weighted mean of a score row, 0 if it saw nothing.
  void write(int64_t i) {
    const int64_t s = i / kRows, r = i % kRows, head_dim = call_.head_dim;
    const float sum = strip_[s].softmax[r].sum;
    const float factor = sum > 0 ? 1.0f / sum : 0.0f;
    const float* from = sums(s, 0) + r * kPanel;
    Element* to = out_ + offset(i);
    for (int64_t column = 0; column < head_dim; column += kPanel, from += kRows * kPanel) {
      for (int64_t j = column; j < least(column + kPanel, head_dim); j += kLanes) {
        store_some(to + j, load(from + j - column) * factor, head_dim - j);
      }
    }
  }

  const Attention& call_;
  const Packed<Element> packed_;
  const int64_t group_, score_rows_, strips_;
  const int32_t* const lo_;
  const int32_t* const hi_;
  const Element* const q_;  // the first score row
  Element* const out_;
  // In scratch memory:
  float* sums_;        // [strips, panels of columns, kRows, kPanel], values weighted so far
  float* scores_;      // [kRows, kScoreStride]
  uint32_t* weights_;  // [kRows, kWeightStride]
  uint32_t* queries_;  // [strips, depth, kRows]
  Strip* strip_;       // [strips]
};

template <typename Element>
void attend(const Attention& call, int64_t kv_head, int64_t row, int64_t rows, uint32_t* scratch) {
  Tile<Element>(call, kv_head, row, rows, scratch).run();
}

template <typename Element>
AttentionKernels kernels() {
  return {packed_words<Element>, pack<Element>, Tile<Element>::scratch_words, attend<Element>};
}

}  // namespace

AttentionKernels attention_kernels(bool is_bfloat16) { return is_bfloat16 ? kernels<Bfloat16>() : kernels<float>(); }

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
