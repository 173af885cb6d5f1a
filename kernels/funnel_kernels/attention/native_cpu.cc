// The XLA FFI handler of attention. It checks the arguments and gives every key a place, then packs keys and values in
// parallel, then computes tiles in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "attention/native_cpu_kernels.h"
#include "cpu/caches.h"
#include "cpu/checks.h"
#include "cpu/handlers.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace funnel {
namespace {

constexpr int64_t kLeastTileRows = 24;       // smaller tiles would not keep the vector units busy
constexpr int64_t kLeastTilesPerThread = 4;  // unless tiles become too small; so that threads finish together
constexpr int64_t kMostLanes = 16;
constexpr int64_t kMostKeys = int64_t{1} << 29;  // which have at most twice as many places, and one step more
constexpr int64_t kPlacesPacked = 4 * kKeyStep;  // at once

// Score rows of a tile, 96 with 1 MB: with head_dim 256 its sums take 3/32 of a core's cache.
int64_t most_tile_rows() { return caches().core / 32 * 3 / (256 * static_cast<int64_t>(sizeof(float))); }

// Query rows of a tile: as many as the cache holds, or fewer if that would leave threads without work.
int64_t tile_rows(const Attention& call, int64_t threads) {
  const int64_t group = call.heads / call.kv_heads;
  int64_t rows = std::max<int64_t>(1, most_tile_rows() / group);
  while (rows * group >= 2 * kLeastTileRows &&
         (call.rows + rows - 1) / rows * call.kv_heads < kLeastTilesPerThread * threads) {
    rows /= 2;
  }
  return rows;
}

// Decides where keys are packed, so that a row's result does not depend on where its sequence lies in the batch.
//
// Keys that intervals join, such as those of a sequence, form a run. A run that fits into what is left of a block lies
// in that block; a longer one begins a block. So blocks cut a run at the same keys wherever it is in the batch. Its
// first key lies at a multiple of its length, rounded up to a power of two, or of kKeyStep if that is less: the lanes
// of vectors are then added in the same order. Keys that nobody sees, such as the padding at the end of a batch, have
// no place.
struct Places {
  std::vector<int32_t> lo, hi, keys, starts;  // as in Attention

  Places(int64_t rows, int64_t key_rows, const int32_t* from, const int32_t* to) : lo(rows), hi(rows) {
    const auto sees = [=](int64_t row) {
      return std::pair<int64_t, int64_t>(std::max(from[row], 0), std::min<int64_t>(to[row], key_rows));
    };
    std::vector<int32_t> reach(key_rows), place(key_rows);  // reach: the end of the longest interval that begins here
    for (int64_t row = 0; row < rows; ++row) {
      const auto [first, last] = sees(row);
      if (first < last) reach[first] = std::max<int32_t>(reach[first], last);
    }
    for (int64_t first = 0, last; first < key_rows; first = std::max(last, first + 1)) {
      last = reach[first];
      for (int64_t key = first + 1; key < last; ++key) last = std::max<int64_t>(last, reach[key]);
      if (first < last) add(first, last, place.data() + first);
    }
    pad(kKeyStep);
    starts.push_back(keys.size());
    for (int64_t row = 0; row < rows; ++row) {
      const auto [first, last] = sees(row);
      if (first < last) lo[row] = place[first], hi[row] = place[last - 1] + 1;
    }
  }

 private:
  void pad(int64_t step) { keys.resize((keys.size() + step - 1) / step * step, -1); }

  void add(int64_t first, int64_t last, int32_t* place) {
    const int64_t count = last - first;
    int64_t step = 1;
    while (step < std::min(count, kMostLanes)) step *= 2;
    pad(step);
    int64_t at = keys.size();
    if (starts.empty() || at + count > starts.back() + kKeyBlock) {
      pad(kKeyStep);
      at = keys.size();
      for (int64_t start = at; start < at + count; start += kKeyBlock) starts.push_back(start);
    }
    keys.resize(at + count);
    std::iota(keys.begin() + at, keys.end(), first);
    std::iota(place, place + count, at);
  }
};

void run(ffi::ThreadPool& pool, int64_t threads, Attention& call, const Places& places, bool is_bfloat16) {
  const AttentionKernels kernels = FUNNEL_BEST(attention_kernels)(is_bfloat16);
  threads = clamp_threads(threads);
  call.lo = places.lo.data();
  call.hi = places.hi.data();
  call.keys = places.keys.data();
  call.places = places.keys.size();
  call.starts = places.starts.data();
  call.blocks = places.starts.size() - 1;

  const Memory packed = allocate(sizeof(uint32_t) * kernels.packed_words(call));
  call.packed = static_cast<uint32_t*>(packed.get());
  const int64_t pieces = (call.places + kPlacesPacked - 1) / kPlacesPacked;
  parallel_for(pool, threads, call.kv_heads * pieces, [&](int64_t index) {
    const int64_t from = index % pieces * kPlacesPacked;
    kernels.pack(call, index / pieces, from, std::min(from + kPlacesPacked, call.places));
  });

  const int64_t rows = tile_rows(call, threads), tiles = (call.rows + rows - 1) / rows;
  std::atomic<bool> failed{false};
  parallel_for(pool, threads, call.kv_heads * tiles, [&](int64_t index) {
    // The last rows first: under a causal mask they take longest. Neighbours share keys.
    const int64_t row = (tiles - 1 - index % tiles) * rows, count = std::min(rows, call.rows - row);
    try {
      thread_local Scratch scratch;
      auto* words = scratch.at_least<uint32_t>(kernels.scratch_words(call, count));
      kernels.attend(call, index / tiles, row, count, words);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer lo,
                     ffi::AnyBuffer hi, ffi::Result<ffi::AnyBuffer> out, int64_t heads, int64_t kv_heads, float scale,
                     float softcap, int64_t threads) {
  const auto dtype = q.element_type();
  if (q.dimensions().size() != 2 || k.dimensions().size() != 2 || (dtype != ffi::F32 && dtype != ffi::BF16)) {
    return invalid("q and k must be matrices of float32 or bfloat16");
  }
  const int64_t rows = q.dimensions()[0], width = q.dimensions()[1], keys = k.dimensions()[0];
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || width < 1 || width % heads != 0) {
    return invalid("heads=" + std::to_string(heads) + " must divide q's width " + std::to_string(width) +
                   " and be a multiple of kv_heads=" + std::to_string(kv_heads));
  }
  const int64_t head_dim = width / heads;
  if (rows < 1 || keys < 1 || keys > kMostKeys) {
    return invalid("attention needs at least one query row, one key row, and at most 2^29 key rows");
  }
  if (!std::isfinite(scale) || !std::isfinite(softcap) || softcap < 0) {
    return invalid("scale=" + std::to_string(scale) + " and softcap=" + std::to_string(softcap) +
                   " must be finite, and the softcap positive or 0 for none");
  }
  ffi::Error error;
  if (!fits("k", k, dtype, {keys, kv_heads * head_dim}, error) ||
      !fits("v", v, dtype, {keys, kv_heads * head_dim}, error) || !fits("lo", lo, ffi::S32, {rows}, error) ||
      !fits("hi", hi, ffi::S32, {rows}, error) || !fits("the result", *out, dtype, {rows, width}, error)) {
    return error;
  }
  if (instruction_set() == InstructionSet::none) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "funnel_native: the processor has no AVX2");
  }
  Attention call{};
  call.q = q.untyped_data();
  call.k = k.untyped_data();
  call.v = v.untyped_data();
  call.out = out->untyped_data();
  call.rows = rows;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.head_dim = head_dim;
  call.scale = scale;
  call.softcap = softcap;
  try {
    const Places places(rows, keys, static_cast<const int32_t*>(lo.untyped_data()),
                        static_cast<const int32_t*>(hi.untyped_data()));
    run(pool, threads, call, places, dtype == ffi::BF16);
  } catch (const std::exception&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "funnel_native: no memory for attention");
  }
  return ffi::Error::Success();
}

}  // namespace

Handlers attention_handlers() {
  XLA_FFI_DEFINE_HANDLER(attention_handler, attention,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("heads")
                             .Attr<int64_t>("kv_heads")
                             .Attr<float>("scale")
                             .Attr<float>("softcap")
                             .Attr<int64_t>("threads"));
  return {{"funnel_attention", attention_handler}};
}

}  // namespace funnel
