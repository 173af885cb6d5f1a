// The two phases of attention over key intervals: keys and values are packed once, then each tile of query rows walks
// over the packed keys that it sees.
#pragma once

#include <stdint.h>

#include "cpu/instruction_set.h"

namespace funnel {

// One call; funnel_kernels/attention/__init__.py says what it computes. All arrays are dense, with the heads side by
// side in a row, and float32 or bfloat16.
struct Attention {
  const void* q;  // [rows, heads * head_dim]
  const void* k;  // [keys, kv_heads * head_dim]
  const void* v;  // as k
  void* out;      // as q
  int64_t rows, heads, kv_heads, head_dim;
  float scale, softcap;  // a softcap of 0 is none
  // Keys have a place in the packed order, see native_cpu.cc.
  const int32_t* lo;      // [rows]: row i sees the places lo[i] <= j < hi[i]
  const int32_t* hi;      // [rows]
  const int32_t* keys;    // [places]: the row of k and v, or -1 for none, which is packed as zeros
  int64_t places;         // a multiple of kKeyStep
  const int32_t* starts;  // [blocks + 1]: of each block, multiples of kKeyStep; the last is `places`
  int64_t blocks;
  uint32_t* packed;  // packed_words, on a cache line
};

constexpr int64_t kKeyStep = 32;    // places that are packed at once are a multiple of this
constexpr int64_t kKeyBlock = 256;  // places in a block, at most

struct AttentionKernels {
  // 4-byte words that the packed keys and values of all heads take.
  int64_t (*packed_words)(const Attention&);
  // Packs the keys and values of one head from place `first` to place `last`, multiples of kKeyStep.
  void (*pack)(const Attention&, int64_t kv_head, int64_t first, int64_t last);
  // 4-byte words that `attend` needs as scratch memory.
  int64_t (*scratch_words)(const Attention&, int64_t rows);
  // Writes the results of query rows [row, row + rows) for the query heads of one key/value head. `scratch` starts on a
  // cache line; no two threads share it.
  void (*attend)(const Attention&, int64_t kv_head, int64_t row, int64_t rows, uint32_t* scratch);
};

FUNNEL_KERNEL(AttentionKernels, attention_kernels, bool is_bfloat16)

}  // namespace funnel
