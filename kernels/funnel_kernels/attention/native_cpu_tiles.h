// What the handlers of attention share: their arguments, which intervals overlap, and tiles that are computed in
// parallel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <string>
#include <vector>

#include "attention/native_cpu_kernels.h"
#include "cpu/caches.h"
#include "cpu/checks.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace funnel {

constexpr int64_t kLeastTileColumns = 48;    // of query rows times heads; fewer would not keep the vector units busy
constexpr int64_t kLeastTilesPerThread = 4;  // unless tiles become too small; so that threads finish together
constexpr int64_t kMostKeys = int64_t{1} << 30;

// Fills in the arrays and the sizes of a call; its intervals are missing.
inline bool read_attention(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                           const ffi::AnyBuffer& lo, const ffi::AnyBuffer& hi, ffi::AnyBuffer& out, int64_t heads,
                           int64_t kv_heads, float scale, Attention& call, ffi::Error& error) {
  const auto dtype = q.element_type();
  if (q.dimensions().size() != 2 || k.dimensions().size() != 2 || !is_float(dtype)) {
    return error = invalid("q and k must be matrices of float32 or bfloat16"), false;
  }
  const int64_t rows = q.dimensions()[0], width = q.dimensions()[1], keys = k.dimensions()[0];
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || width < 1 || width % heads != 0) {
    return error = invalid("heads=" + std::to_string(heads) + " must divide q's width " + std::to_string(width) +
                           " and be a multiple of kv_heads=" + std::to_string(kv_heads)),
           false;
  }
  const int64_t head_dim = width / heads;
  if (rows < 1 || keys < 1 || keys > kMostKeys) {
    return error = invalid("attention needs at least one query row, one key row, and at most 2^30 key rows"), false;
  }
  if (!std::isfinite(scale)) return error = invalid("scale=" + std::to_string(scale) + " must be finite"), false;
  if (!fits("k", k, dtype, {keys, kv_heads * head_dim}, error) ||
      !fits("v", v, dtype, {keys, kv_heads * head_dim}, error) || !fits("lo", lo, ffi::S32, {rows}, error) ||
      !fits("hi", hi, ffi::S32, {rows}, error) || !fits("the result", out, dtype, {rows, width}, error)) {
    return false;
  }
  if (instruction_set() == InstructionSet::none) {
    error = ffi::Error(ffi::ErrorCode::kUnimplemented, "funnel_native: the processor has no AVX2");
    return false;
  }
  call.q = q.untyped_data();
  call.k = k.untyped_data();
  call.v = v.untyped_data();
  call.out = out.untyped_data();
  call.rows = rows;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.head_dim = head_dim;
  call.scale = scale;
  return true;
}

// The rows' intervals, inside the keys, and the runs that they form, see Attention. The call points to them.
struct Intervals {
  std::vector<int32_t> lo, hi, run;

  Intervals(Attention& call, int64_t keys, const int32_t* from, const int32_t* to)
      : lo(call.rows), hi(call.rows), run(call.rows) {
    const int64_t rows = call.rows;
    std::vector<int32_t> reach(keys), start(keys);  // reach: the end of the longest interval that begins here
    for (int64_t row = 0; row < rows; ++row) {
      lo[row] = std::max(from[row], 0);
      hi[row] = std::min<int64_t>(to[row], keys);
      if (lo[row] < hi[row]) reach[lo[row]] = std::max(reach[lo[row]], hi[row]);
    }
    int32_t first = 0, last = 0;  // of the run that holds the key, or of the one before it
    for (int32_t key = 0; key < keys; ++key) {
      if (key >= last) first = key;
      last = std::max(last, reach[key]);
      start[key] = first;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const bool empty = lo[row] >= hi[row];
      run[row] = !empty ? start[lo[row]] : row > 0 ? run[row - 1] : 0;
    }
    call.lo = lo.data();
    call.hi = hi.data();
    call.run = run.data();
  }
};

// Columns of a tile, 288 with 1 MB: with head_dim 256 its queries and results take 9/16 of a core's cache. The keys of
// a block take a quarter.
inline int64_t most_tile_columns() { return caches().core / 32 * 9 / (256 * static_cast<int64_t>(sizeof(float))); }

// The most query rows of a tile: as many as the cache holds, or fewer if that would leave threads without work.
inline int64_t tile_rows(const Attention& call, int64_t threads) {
  const int64_t group = call.heads / call.kv_heads, most = std::max<int64_t>(1, most_tile_columns() / group);
  const int64_t wanted = (kLeastTilesPerThread * threads + call.kv_heads - 1) / call.kv_heads;
  if (call.rows >= wanted * most) return most;
  const int64_t tiles = std::clamp<int64_t>(call.rows * group / kLeastTileColumns, 1, wanted);
  return std::min(most, (call.rows + tiles - 1) / tiles);
}

// Where tiles of at most `rows` rows begin, and the end of the last. A run that begins late in a tile and does not end
// there waits for the next one: its keys are packed for each tile.
inline std::vector<int64_t> tile_starts(const Attention& call, int64_t rows) {
  std::vector<int64_t> starts = {0};
  for (int64_t end = rows; end < call.rows; end = starts.back() + rows) {
    int64_t cut = end;
    while (cut > starts.back() && call.run[cut - 1] == call.run[end]) --cut;
    starts.push_back(2 * (cut - starts.back()) >= rows ? cut : end);
  }
  starts.push_back(call.rows);
  return starts;
}

// Computes the tiles of a call, an Attention or what is made of one, with kernels like AttentionKernels.
template <typename Call, typename Kernels>
void attend_tiles(ffi::ThreadPool& pool, int64_t threads, const Call& call, const Kernels& kernels) {
  const std::vector<int64_t> starts = tile_starts(call, tile_rows(call, clamp_threads(threads)));
  const int64_t tiles = starts.size() - 1;
  std::atomic<bool> failed{false};
  parallel_for(pool, threads, call.kv_heads * tiles, [&](int64_t index) {
    // The last rows first: under a causal mask they take longest.
    const int64_t tile = tiles - 1 - index / call.kv_heads, row = starts[tile], count = starts[tile + 1] - row;
    try {
      thread_local Scratch scratch;
      auto* words = scratch.at_least<uint32_t>(kernels.scratch_words(call, count));
      kernels.attend(call, index % call.kv_heads, row, count, words);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace funnel
