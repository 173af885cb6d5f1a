// Attention over key intervals, one tile at a time: some query rows, and the query heads of one key/value head.
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
  // Row i sees the keys lo[i] <= j < hi[i]. Intervals that overlap, directly or through others, such as those of one
  // sequence, form a run; run[i] is the first key of the row's. A row that sees nothing belongs to the run before it.
  const int32_t* lo;   // [rows]
  const int32_t* hi;   // [rows]
  const int32_t* run;  // [rows]
};

struct AttentionKernels {
  // 4-byte words that `attend` needs as scratch memory for a tile of `rows` query rows.
  int64_t (*scratch_words)(const Attention&, int64_t rows);
  // Writes the results of query rows [row, row + rows) for the query heads of one key/value head. `scratch` starts on a
  // cache line; no two threads share it.
  void (*attend)(const Attention&, int64_t kv_head, int64_t row, int64_t rows, uint32_t* scratch);
};

FUNNEL_KERNEL(AttentionKernels, attention_kernels, bool is_bfloat16)

}  // namespace funnel
