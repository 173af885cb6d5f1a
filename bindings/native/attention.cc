// The XLA FFI handler of attention: checks, packs keys and values in parallel, then works on tiles in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <string>

#include "attention_kernels.h"
#include "checks.h"
#include "handlers.h"
#include "memory.h"
#include "parallel.h"

namespace funnel {
namespace {

constexpr int64_t kTileRows = 96;        // score rows; with head_dim 256, a tile's sums take 96 KB of a core's cache
constexpr int64_t kLeastTileRows = 24;   // smaller tiles would not keep the vector units busy
constexpr int64_t kTilesPerThread = 4;   // at least, if tiles do not become too small, so that threads finish together
constexpr int64_t kKeysPacked = 4 * kKeyStep;  // at once

// Query rows of a tile: as many as the cache holds, or fewer if that would leave threads without work.
int64_t tile_rows(const Attention& call, int64_t threads) {
  const int64_t group = call.heads / call.kv_heads;
  int64_t rows = std::max<int64_t>(1, kTileRows / group);
  while (rows * group >= 2 * kLeastTileRows &&
         (call.rows + rows - 1) / rows * call.kv_heads < kTilesPerThread * threads) {
    rows /= 2;
  }
  return rows;
}

void run(ffi::ThreadPool& pool, int64_t threads, Attention& call, bool is_bfloat16) {
  const AttentionKernels kernels = FUNNEL_BEST(attention_kernels)(is_bfloat16);
  threads = sane_threads(threads);

  // Rows that nobody sees, such as the padding at the end of a batch, are not packed.
  int64_t first = call.keys, last = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    const int64_t lo = std::max<int64_t>(call.lo[i], 0), hi = std::min<int64_t>(call.hi[i], call.keys);
    if (lo < hi) {
      first = std::min(first, lo);
      last = std::max(last, hi);
    }
  }
  call.first_key = std::min(first, last) / kKeyStep * kKeyStep;
  call.last_key = (last + kKeyStep - 1) / kKeyStep * kKeyStep;

  const Memory packed = allocate(sizeof(uint32_t) * kernels.packed_words(call));
  call.packed = static_cast<uint32_t*>(packed.get());
  const int64_t pieces = (call.last_key - call.first_key + kKeysPacked - 1) / kKeysPacked;
  parallel_for(pool, threads, call.kv_heads * pieces, [&](int64_t index) {
    const int64_t from = call.first_key + index % pieces * kKeysPacked;
    kernels.pack(call, index / pieces, from, std::min(from + kKeysPacked, call.last_key));
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
  if (rows < 1 || keys < 1 || keys > std::numeric_limits<int32_t>::max()) {
    return invalid("attention needs at least one query row, one key row, and at most 2^31 - 1 key rows");
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
  call.lo = static_cast<const int32_t*>(lo.untyped_data());
  call.hi = static_cast<const int32_t*>(hi.untyped_data());
  call.out = out->untyped_data();
  call.rows = rows;
  call.keys = keys;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.head_dim = head_dim;
  call.scale = scale;
  call.softcap = softcap;
  try {
    run(pool, threads, call, dtype == ffi::BF16);
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
