// Attention with the scores of Funnel-Transformer: the tiles of attention/native_cpu_kernels.h, with two more terms.
#pragma once

#include <stdint.h>

#include "attention/native_cpu_kernels.h"

namespace funnel {

constexpr int32_t kBoth = 2;  // the token type that counts as the same as every other type

// One call; funnel_kernels/relative_attention/__init__.py says what it computes. Every head has keys of its own.
struct RelativeAttention : Attention {
  const int32_t* query_types;  // [rows]
  const int32_t* key_types;    // [keys]
  const void* biases;          // [3, heads * head_dim], as q: of content, position and type
  const void* offsets;         // [2 * reach + 1, heads * head_dim], as q
  const void* same;            // [2, heads * head_dim], as q
  int64_t reach, stride;
  bool separate_first;
  const uint32_t* tables;  // [heads, table_words]: what pack_table has made of the offsets
};

struct RelativeAttentionKernels {
  // 4-byte words of the table of one head.
  int64_t (*table_words)(const RelativeAttention&);
  // Writes the offsets of a head in the order in which `attend` reads them.
  void (*pack_table)(const RelativeAttention&, int64_t head, uint32_t* table);
  // As those of AttentionKernels.
  int64_t (*scratch_words)(const RelativeAttention&, int64_t rows);
  void (*attend)(const RelativeAttention&, int64_t head, int64_t row, int64_t rows, uint32_t* scratch);
};

FUNNEL_KERNEL(RelativeAttentionKernels, relative_attention_kernels, bool is_bfloat16)

}  // namespace funnel
