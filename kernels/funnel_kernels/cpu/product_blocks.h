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

// Lines of memory that a loop fetches, some in each step. There is no branch: where nothing is left, `step` is 0, and
// the line is one that is in the cache.
struct Lines {
  const char* next;
  int64_t step;

  template <int kCount = 1>
  void fetch() {
#pragma GCC unroll 2
    for (int n = 0; n < kCount; ++n) _mm_prefetch(next + n * step, _MM_HINT_T1);
    next += kCount * step;
  }
};

// Memory that is needed next. Each block of rows takes lines of it.
class Ahead {
 public:
  // `blocks` blocks follow one another before the memory is needed.
  Ahead(const void* from, int64_t bytes, int64_t blocks)
      : from_(static_cast<const char*>(from)), left_(blocks < kFetchingBlocks ? 0 : bytes) {}

  // The result must not outlive this.
  Lines take(int64_t lines) {
    if (left_ <= 0) return {reinterpret_cast<const char*>(this), 0};
    const char* taken = from_;
    from_ += lines * kLine;
    left_ -= lines * kLine;
    return {taken, kLine};
  }

 private:
  const char* from_;
  int64_t left_;
};

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
