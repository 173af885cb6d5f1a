#include "attention/native_cpu_kernels.h"

#include "attention/native_cpu_tile.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

template <typename Element>
void attend(const Attention& call, int64_t kv_head, int64_t row, int64_t rows, uint32_t* scratch) {
  Tile<Element>(call, kv_head, rows, scratch).run(row, rows);
}

template <typename Element>
AttentionKernels kernels() {
  return {Tile<Element>::scratch_words, attend<Element>};
}

}  // namespace

AttentionKernels attention_kernels(bool is_bfloat16) { return is_bfloat16 ? kernels<Bfloat16>() : kernels<float>(); }

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
