// A tile of attention, for sources that are compiled once for each instruction set.
//
// A column is one query head of one query row. Everything here is transposed, and a vector holds one number of each of
// kLanes columns: scores are keys times queries, [keys, columns], and results are values times weights, [head_dim,
// columns]. So a softmax adds vectors and not the lanes of a vector, and keys are computed in steps of kRows. Only
// queries and results, which are needed once, are transposed. Keys and values are copied block by block, so that they
// lie next to each other in the cache.
//
// Both products are `multiply`: kRows rows of A, one word at a time, times a panel of B, at most kMostVectors vectors
// wide. A word is a float, or two neighbouring bfloat16 of the sum where the processor multiplies them in pairs.
//
// A column's softmax is computed block by block, with a running maximum and sum (Milakov and Gimelshein,
// arXiv:1805.02867; FlashAttention, arXiv:2205.14135). Scores are in units of ln 2: weights are powers of two. Blocks
// are counted from the start of a column's run, and a key that it does not see adds exactly 0. So a result does not
// depend on the columns beside it.
#pragma once

#include "attention/native_cpu_kernels.h"
#include "cpu/simd.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// kRows x kMostVectors vectors of sums, kMostVectors of B and one of A fill the registers: 32 with AVX-512, 16 without.
constexpr int kRows = kLanes / 2;
constexpr int kMostVectors = 3;
constexpr int64_t kKeyBlock = 128;  // keys in a block: their weights for a panel stay in the cache of level 1
constexpr int64_t kRowsAhead = 4;   // how many rows of keys and values are fetched before they are needed
constexpr float kLowest = -3e38f;   // below any score, and finite
constexpr float kLog2E = 1.44269504f;
static_assert(kKeyBlock % kRows == 0 && kLanes % kRows == 0);

// Elements in a word.
#ifdef __AVX512BF16__
template <typename Element>
constexpr int64_t kPerWord = 4 / sizeof(Element);
#else
template <typename Element>
constexpr int64_t kPerWord = 1;
#endif

typedef uint32_t WordsAt __attribute__((vector_size(4 * FUNNEL_LANES), aligned(2), may_alias));
Words load_words(const uint32_t* from) { return *reinterpret_cast<const WordsAt*>(from); }
Ints load_ints(const int32_t* from) { return (Ints)load_words(reinterpret_cast<const uint32_t*>(from)); }
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

// A (kRows rows of `depth` words, of which word i of row r is a[r * row_stride + i * word_stride]) times a panel of B
// [depth, kVectors * kLanes]. `finish(r, sums)` gets the vectors of sums of row r. Not inlined: what the surrounding
// loop keeps in registers would push sums out of them.
template <typename Element, int kVectors, typename Finish>
__attribute__((noinline)) void multiply(const uint32_t* a, int64_t row_stride, int64_t word_stride, const uint32_t* b,
                                        int64_t depth, const Finish& finish) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t i = 0; i < depth; ++i, a += word_stride, b += kVectors * kLanes) {
    Words columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load_words(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Words word = Words{} + a[r * row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<Element>(word, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) finish(r, sums[r]);
}

// ---------------------------------------------------------------------------------------------------------- words

template <typename Element>
int64_t words_of(int64_t elements) {
  return (elements + kPerWord<Element> - 1) / kPerWord<Element>;
}

// kLanes words of a row of `elements`, from word `at` on. What lies beyond its end is 0, and so is a null row.
template <typename Element>
Words words_at(const Element* row, int64_t at, int64_t elements) {
  if (row == nullptr) return Words{};
  const int64_t first = at * kPerWord<Element>, left = elements - first;
  if constexpr (sizeof(Element) * kPerWord<Element> == sizeof(uint32_t)) {
    const auto* words = reinterpret_cast<const uint32_t*>(row + first);
    if (left >= kLanes * kPerWord<Element>) return load_words(words);
    Words part = {};
    __builtin_memcpy(&part, words, left * sizeof(Element));
    return part;
  } else {
    return (Words)load_some(row + first, left);  // bfloat16, widened
  }
}

// Element i of row r becomes element r of row i: the bits of a number's row and lane, taken together, turn by one place
// each time that the halves of the rows are interleaved.
void transpose(Words (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Words turned[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Words a = rows[i], b = rows[i + kLanes / 2];
#if FUNNEL_LANES == 16
      turned[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      turned[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
      turned[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      turned[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
}

// Transposes `count` rows of `elements` into a panel of B, [words, stride], in whole vectors of words and rows; words
// and rows that are left over become 0. row(i) is where row i begins.
template <typename Element, typename Row>
void transpose_rows(uint32_t* to, int64_t stride, int64_t count, int64_t elements, const Row& row) {
  for (int64_t first = 0; first < stride; first += kLanes) {
    for (int64_t at = 0; at < words_of<Element>(elements); at += kLanes) {
      Words words[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t next = first + i + kLanes;
        words[i] = words_at<Element>(first + i < count ? row(first + i) : nullptr, at, elements);
        if (next < count) __builtin_prefetch(row(next) + at * kPerWord<Element>);
      }
      transpose(words);
      for (int64_t i = 0; i < kLanes; ++i) store_words(to + (at + i) * stride + first, words[i]);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- softmax

// 2^x for x <= 127; below -126 it is 2^-126, which is negligible beside the largest weight, 1.
//
// x = n + f with |f| <= 1/2, 2^f by the polynomial of degree 5 whose largest relative error is least (2^-23.4), and n
// added to the exponent.
Floats power_of_two(Floats x) {
  const Floats clamped = maximum(broadcast(-126.0f), x);
  const Floats shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer, its low bits are n
  const Floats f = clamped - (shifted - 12582912.0f);
  Floats p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  return (Floats)((Words)p + ((Words)shifted << 23));
}

// cap * tanh(x), where tanh(x) = 1 - 2 / (e^2x + 1) and the exponent is 2x in units of ln 2.
Floats capped(Floats exponent, float cap) {
  return cap - 2.0f * cap / (power_of_two(minimum(broadcast(126.0f), exponent)) + 1.0f);
}

// Stores the weights of a word of keys.
template <typename Element>
void store_weights(float* to, const Floats (&weights)[kPerWord<Element>]) {
#ifdef __AVX512BF16__
  if constexpr (kPerWord<Element> == 2) {
    typedef uint16_t Pairs __attribute__((vector_size(4 * FUNNEL_LANES)));
    const Pairs both = (Pairs)_mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]);
    return store(to, (Floats)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }
#endif
  store(to, weights[0]);
}

// ----------------------------------------------------------------------------------------------------------- tile

// Neighbouring columns whose products are computed together.
struct Panel {
  int64_t column, vectors;   // the first column, and how many vectors of columns
  int64_t from, to;          // the keys that any column sees lie in [from, to)
  int64_t all_from, all_to;  // every column sees those in [all_from, all_to)
  bool fresh;                // it has no results yet
};

// The columns of some query rows. Those of one run are computed together, and keys are counted from its start.
template <typename Element>
class Tile {
 public:
  Tile(const Attention& call, int64_t kv_head, int64_t rows, uint32_t* scratch)
      : call_(call), size_(call, rows), kv_head_(kv_head) {
    queries_ = scratch;
    keys_ = queries_ + size_.columns * size_.depth;
    values_ = keys_ + kKeyBlock * size_.depth;
    scores_ = reinterpret_cast<float*>(values_ + size_.width * kValueWords);
    results_ = scores_ + kKeyBlock * kMostVectors * kLanes;
    maxima_ = results_ + size_.columns * size_.width;
    sums_ = maxima_ + size_.columns;
    lo_ = reinterpret_cast<int32_t*>(sums_ + size_.columns);
    hi_ = lo_ + size_.columns;
    offsets_ = reinterpret_cast<int64_t*>(hi_ + size_.columns);
    panels_ = reinterpret_cast<Panel*>(offsets_ + size_.columns);
  }

  static int64_t scratch_words(const Attention& call, int64_t rows) {
    const Size size(call, rows);
    return size.columns * (size.depth + size.width + 6) + kKeyBlock * (size.depth + kMostVectors * kLanes) +
           size.width * kValueWords + size.columns / kLanes * (sizeof(Panel) / sizeof(uint32_t));
  }

  void run(int64_t row, int64_t rows) {
    const int64_t group = call_.heads / call_.kv_heads;
    columns_ = 0;
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t offset = (i * call_.heads + kv_head_ * group) * call_.head_dim;
      if (call_.lo[i] >= call_.hi[i]) {
        __builtin_memset(static_cast<Element*>(call_.out) + offset, 0, group * call_.head_dim * sizeof(Element));
        continue;
      }
      if (columns_ > 0 && call_.run[i] != run_) attend();
      run_ = call_.run[i];
      for (int64_t head = 0; head < group; ++head, ++columns_) {
        lo_[columns_] = call_.lo[i] - run_;
        hi_[columns_] = call_.hi[i] - run_;
        offsets_[columns_] = offset + head * call_.head_dim;
      }
    }
    if (columns_ > 0) attend();
  }

 protected:
  // Words of one column of packed values: the keys of a block, and one more, or else the strips of kLanes columns would
  // compete for the same places in the cache.
  static constexpr int64_t kValueWords = kKeyBlock / kPerWord<Element> + 1;

  struct Size {
    int64_t columns;  // filled up to whole vectors
    int64_t depth;    // words of a query or a key, filled up too
    int64_t width;    // elements of a value, filled up too

    Size(const Attention& call, int64_t rows)
        : columns(round_up(rows * (call.heads / call.kv_heads), kLanes)),
          depth(round_up(words_of<Element>(call.head_dim), kLanes)),
          width(round_up(call.head_dim, kLanes)) {}
  };

  // Computes the results of the columns, whose keys are of one run, and removes them.
  void attend() {
    for (int64_t i = columns_; i % kLanes != 0; ++i) {  // lanes that are left over see what the last column sees
      lo_[i] = lo_[columns_ - 1];
      hi_[i] = hi_[columns_ - 1];
    }
    const int64_t vectors = (columns_ + kLanes - 1) / kLanes, panels = (vectors + kMostVectors - 1) / kMostVectors;
    int64_t from = INT64_MAX, to = 0;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = vectors * i / panels, last = vectors * (i + 1) / panels;
      panels_[i] = panel(first * kLanes, last - first);
      start(panels_[i]);
      for (int64_t column = first * kLanes; column < last * kLanes; column += kLanes) {
        store(maxima_ + column, broadcast(kLowest));
        store(sums_ + column, Floats{});
      }
      from = least(from, panels_[i].from);
      to = greatest(to, panels_[i].to);
    }
    from = round_down(from, kRows);
    for (int64_t block = round_down(from, kKeyBlock); block < to; block += kKeyBlock) {
      pack(block, greatest(from, block), least(to, block + kKeyBlock));
      ahead_ = block + kKeyBlock;
      ahead_end_ = least(to, ahead_ + kKeyBlock);
      for (Panel* panel = panels_; panel < panels_ + panels; ++panel) {
        const int64_t first = greatest(round_down(panel->from, kRows), block);
        const int64_t last = least(panel->to, block + kKeyBlock);
        if (first >= last) continue;
        if (panel->vectors == 3) visit<3>(*panel, block, first, last);
        if (panel->vectors == 2) visit<2>(*panel, block, first, last);
        if (panel->vectors == 1) visit<1>(*panel, block, first, last);
      }
    }
    for (int64_t i = 0; i < panels; ++i) write(panels_[i]);
    columns_ = 0;
  }

  Panel panel(int64_t column, int64_t vectors) const {
    Panel panel = {column, vectors, INT64_MAX, 0, 0, INT64_MAX, true};
    for (int64_t i = column; i < column + vectors * kLanes; ++i) {
      panel.from = least(panel.from, lo_[i]);
      panel.to = greatest(panel.to, hi_[i]);
      panel.all_from = greatest(panel.all_from, lo_[i]);
      panel.all_to = least(panel.all_to, hi_[i]);
    }
    return panel;
  }

  uint32_t* queries(const Panel& panel) const { return queries_ + panel.column * size_.depth; }
  float* results(const Panel& panel) const { return results_ + panel.column * size_.width; }

  const Element* query(int64_t column) const { return static_cast<const Element*>(call_.q) + offsets_[column]; }

  // Transposes the queries of a panel.
  virtual void start(const Panel& panel) {
    transpose_rows<Element>(queries(panel), panel.vectors * kLanes, columns_ - panel.column, call_.head_dim,
                            [&](int64_t i) { return query(panel.column + i); });
  }

  // Adds to the scores of a panel and the keys [from, to), in scores_, what is not a product of queries and keys.
  virtual void add_terms(const Panel&, int64_t /*from*/, int64_t /*to*/) {}

  // Packs the keys and values [from, to) of a block; `from` is a multiple of kRows. The last kRows keys are filled up
  // with zeros. Rows of one head may lie far apart: in a first block, which fetch_ahead has not fetched, the processor
  // is told which ones come soon.
  void pack(int64_t block, int64_t from, int64_t to) {
    const int64_t d = call_.head_dim, depth = size_.depth, width = size_.width, stride = call_.kv_heads * d;
    const int64_t start = (run_ * call_.kv_heads + kv_head_) * d;
    const auto *k = static_cast<const Element*>(call_.k) + start, *v = static_cast<const Element*>(call_.v) + start;
    uint32_t* keys = keys_ + (from - block) * depth;
    for (int64_t key = from; key < round_up(to, kRows); ++key) {
      const Element* row = key < to ? k + key * stride : nullptr;
      for (int64_t at = 0; at < depth; at += kLanes, keys += kLanes) {
        __builtin_prefetch(k + (key + kRowsAhead) * stride + at * kPerWord<Element>);
        store_words(keys, words_at(row, at, d));
      }
    }
    for (int64_t key = from; key < to; key += kPerWord<Element>) {
      uint32_t* values = values_ + (key - block) / kPerWord<Element> * kLanes;
      for (int64_t column = 0; column < width; column += kLanes, values += kLanes * kValueWords) {
        const Element* value = v + key * stride + column;
        __builtin_prefetch(value + kRowsAhead * stride);
        Words words = (Words)load_some(value, d - column);
        if constexpr (kPerWord<Element> == 2) {
          words = words >> 16;
          if (key + 1 < to) words |= (Words)load_some(value + stride, d - column);
        }
        store_words(values, words);
      }
    }
  }

  // Fetches a key and a value of the next block into the cache, while this one is computed.
  void fetch_ahead() {
    if (ahead_ >= ahead_end_) return;
    const int64_t d = call_.head_dim, start = ((run_ + ahead_++) * call_.kv_heads + kv_head_) * d;
    const auto *k = static_cast<const Element*>(call_.k) + start, *v = static_cast<const Element*>(call_.v) + start;
    for (int64_t i = 0; i < d; i += 64 / sizeof(Element)) {
      __builtin_prefetch(k + i, 0, 2);
      __builtin_prefetch(v + i, 0, 2);
    }
  }

  // Adds what the keys [from, to) of a block contribute to a panel; `from` is a multiple of kRows.
  template <int kVectors>
  void visit(Panel& panel, int64_t block, int64_t from, int64_t to) {
    constexpr int64_t stride = kVectors * kLanes;
    const int64_t count = to - from;
    for (int64_t key = 0; key < count; key += kRows) {
      fetch_ahead();
      float* scores = scores_ + key * stride;
      multiply<Element, kVectors>(keys_ + (from - block + key) * size_.depth, size_.depth, 1, queries(panel),
                                  words_of<Element>(call_.head_dim),
                                  [scores](int r, const Floats(&products)[kVectors]) {
                                    for (int v = 0; v < kVectors; ++v) {
                                      store(scores + r * stride + v * kLanes, products[v]);
                                    }
                                  });
    }

    add_terms(panel, from, to);
    Floats shrink[kVectors];
    const bool all_visible = panel.all_from <= from && to <= panel.all_to && count % kPerWord<Element> == 0;
    if (all_visible) {
      weigh<kVectors, true>(panel.column, from, count, shrink);
    } else {
      weigh<kVectors, false>(panel.column, from, count, shrink);
    }

    const uint32_t* values = values_ + (from - block) / kPerWord<Element> * kLanes;
    const bool fresh = panel.fresh;
    for (int64_t row = 0; row < size_.width; row += kRows) {
      fetch_ahead();
      float* sums = results(panel) + row * stride;
      multiply<Element, kVectors>(values + round_down(row, kLanes) * kValueWords + row % kLanes, 1, kLanes,
                                  reinterpret_cast<const uint32_t*>(scores_), words_of<Element>(count),
                                  [sums, fresh, &shrink](int r, const Floats(&products)[kVectors]) {
                                    for (int v = 0; v < kVectors; ++v) {
                                      float* sum = sums + r * stride + v * kLanes;
                                      store(sum, fresh ? products[v] : load(sum) * shrink[v] + products[v]);
                                    }
                                  });
    }
    panel.fresh = false;
  }

  // Turns the products of a panel's queries and `count` keys from `first` on into weights relative to the running
  // maxima, in place. Returns in `shrink` what former sums are multiplied by.
  template <int kVectors, bool kAllVisible>
  void weigh(int64_t column, int64_t first, int64_t count, Floats (&shrink)[kVectors]) {
    constexpr int64_t stride = kVectors * kLanes;
    Ints lo[kVectors];
    Words extent[kVectors];
    Floats highest[kVectors], sum[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      lo[v] = load_ints(lo_ + column + v * kLanes);
      extent[v] = (Words)(load_ints(hi_ + column + v * kLanes) - lo[v]);
      highest[v] = load(maxima_ + column + v * kLanes);
    }
    const auto where_visible = [&](int64_t key, int v, Floats value, float otherwise) {
      if constexpr (kAllVisible) return value;
      const Words after_lo = (Words)(static_cast<int32_t>(first + key) - lo[v]);  // before lo it wraps to large ones
      return after_lo < extent[v] ? value : broadcast(otherwise);
    };
    const auto find_highest = [&](const auto& score_at) {
      float* scores = scores_;
      for (int64_t key = 0; key < count; ++key, scores += stride) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          highest[v] = maximum(highest[v], where_visible(key, v, score_at(scores + v * kLanes), kLowest));
        }
      }
    };
    float factor = call_.scale * kLog2E;  // what the numbers in memory are multiplied by
    if (call_.softcap == 0) {
      find_highest([factor](const float* at) { return load(at) * factor; });
    } else {
      const float to_exponent = 2.0f * kLog2E * call_.scale / call_.softcap, cap = call_.softcap * kLog2E;
      find_highest([to_exponent, cap](float* at) {
        const Floats score = capped(load(at) * to_exponent, cap);
        store(at, score);
        return score;
      });
      factor = 1.0f;
    }

    const float* scores = scores_;
    float* weights = scores_;
    for (int64_t key = 0; key < count; key += kPerWord<Element>, weights += stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Floats word[kPerWord<Element>];
        for (int i = 0; i < kPerWord<Element>; ++i) {
          const Floats score = load(scores + i * stride + v * kLanes) * factor - highest[v];
          word[i] = where_visible(key + i, v, power_of_two(score), 0.0f);
          sum[v] += word[i];
        }
        store_weights<Element>(weights + v * kLanes, word);
      }
      scores += kPerWord<Element> * stride;
    }

    for (int v = 0; v < kVectors; ++v) {
      float *const maxima = maxima_ + column + v * kLanes, *const sums = sums_ + column + v * kLanes;
      shrink[v] = power_of_two(load(maxima) - highest[v]);
      store(maxima, highest[v]);
      store(sums, load(sums) * shrink[v] + sum[v]);
    }
  }

  // Transposes the weighted means of a panel into the result.
  void write(const Panel& panel) const {
    const int64_t stride = panel.vectors * kLanes, d = call_.head_dim;
    auto* out = static_cast<Element*>(call_.out);
    for (int64_t first = 0; first < stride; first += kLanes) {
      const int64_t column = panel.column + first, real = least(kLanes, columns_ - column);
      const Floats factor = 1.0f / load(sums_ + column);
      for (int64_t at = 0; at < d; at += kLanes) {
        Words words[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          words[i] = (Words)(load(results(panel) + (at + i) * stride + first) * factor);
        }
        transpose(words);
        for (int64_t i = 0; i < real; ++i) {
          store_some(out + offsets_[column + i] + at, (Floats)words[i], d - at);
          const int64_t next = column + i + kLanes;
          if (next < columns_) __builtin_prefetch(out + offsets_[next] + at, 1);
        }
      }
    }
  }

  const Attention& call_;
  const Size size_;
  const int64_t kv_head_;
  int64_t columns_ = 0, run_ = 0;
  int64_t ahead_ = 0, ahead_end_ = 0;  // keys that are fetched meanwhile
  // In scratch memory; what belongs to a panel is [rows, columns of the panel].
  uint32_t* queries_;      // [panels, depth, columns]
  uint32_t* keys_;         // [kKeyBlock, depth]
  uint32_t* values_;       // [width / kLanes, kValueWords, kLanes]
  float* scores_;          // [kKeyBlock, columns] of one panel, then their weights, as words
  float* results_;         // [panels, width, columns]: values, weighted so far
  float *maxima_, *sums_;  // [columns]: the softmax so far
  int32_t *lo_, *hi_;      // [columns]: the keys that each sees
  int64_t* offsets_;       // [columns]: where its query and its result begin
  Panel* panels_;
};

}  // namespace
}  // namespace funnel::FUNNEL_INSTRUCTION_SET
