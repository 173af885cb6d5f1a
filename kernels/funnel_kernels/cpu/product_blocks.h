// What the kernels of products share: a tile's rows are multiplied in blocks, which meanwhile fetch what comes next.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace funnel::FUNNEL_INSTRUCTION_SET {

constexpr int kBlockRows = 6;           // whose sums stay in registers
constexpr int64_t kFetchingBlocks = 3;  // with at least this many, one after another, there is time to fetch
constexpr int64_t kLine = 64;           // bytes of a cache line

// Not std::min, see instruction_set.h.
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Calls function with `number`, which is at most kMost, as a constant.
template <int kMost, typename Function>
static inline void with_constant(int64_t number, const Function& function) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_constant<kMost - 1>(number, function);
  }
  function(Constant<kMost>{});
}

// The rows of a tile in blocks of nearly equal size.
struct Blocks {
  int64_t rows, count, size;

  explicit Blocks(int64_t rows) : rows(rows), count(divide_up(rows, kBlockRows)), size(divide_up(rows, count)) {}

  // Calls multiply(its number of rows as a constant, its first row) for each block.
  template <typename Multiply>
  void for_each(const Multiply& multiply) const {
    for (int64_t row = 0; row < rows; row += size) {
      with_constant<kBlockRows>(smaller(size, rows - row), [&](auto block_rows) { multiply(block_rows, row); });
    }
  }
};

// Memory that is needed next. Each block of rows takes lines of it, and fetches one with each step of its loop.
class Ahead {
 public:
  // `blocks` blocks follow one another before the memory is needed.
  Ahead(const void* from, int64_t bytes, int64_t blocks)
      : from_(static_cast<const char*>(from)), left_(blocks < kFetchingBlocks ? 0 : bytes) {}

  // Null if nothing is left.
  const char* take(int64_t lines) {
    if (left_ <= 0) return nullptr;
    const char* taken = from_;
    from_ += lines * kLine;
    left_ -= lines * kLine;
    return taken;
  }

 private:
  const char* from_;
  int64_t left_;
};

// Fetches line `index` of what a block has taken.
static inline void fetch(const char* taken, int64_t index) {
  if (taken != nullptr) _mm_prefetch(taken + index * kLine, _MM_HINT_T1);
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
