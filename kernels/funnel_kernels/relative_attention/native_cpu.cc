// The XLA FFI handler of `relative_attention`. It checks the arguments, makes the tables of offsets, and computes tiles
// in parallel, as attention does.
#include <exception>
#include <string>

#include "attention/native_cpu_tiles.h"
#include "cpu/handlers.h"
#include "relative_attention/native_cpu_kernels.h"

namespace funnel {
namespace {

constexpr int64_t kMostStride = int64_t{1} << 30;  // so that no distance overflows

void make_tables_and_attend(ffi::ThreadPool& pool, int64_t threads, RelativeAttention& call, bool is_bfloat16) {
  const RelativeAttentionKernels kernels = FUNNEL_BEST(relative_attention_kernels)(is_bfloat16);
  thread_local Scratch scratch;
  const int64_t words = kernels.table_words(call);
  auto* tables = scratch.at_least<uint32_t>(call.heads * words);
  parallel_for(pool, threads, call.heads, [&](int64_t head) { kernels.pack_table(call, head, tables + head * words); });
  call.tables = tables;
  attend_tiles(pool, threads, call, kernels);
}

ffi::Error relative_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                              ffi::AnyBuffer lo, ffi::AnyBuffer hi, ffi::AnyBuffer query_types,
                              ffi::AnyBuffer key_types, ffi::AnyBuffer biases, ffi::AnyBuffer offsets,
                              ffi::AnyBuffer same, ffi::Result<ffi::AnyBuffer> out, int64_t heads, float scale,
                              int64_t stride, bool separate_first, int64_t threads) {
  ffi::Error error;
  RelativeAttention call{};
  if (!read_attention(q, k, v, lo, hi, *out, heads, heads, scale, call, error)) return error;
  const auto dtype = q.element_type();
  const int64_t keys = k.dimensions()[0], width = q.dimensions()[1];
  const int64_t distances = offsets.dimensions().size() == 2 ? offsets.dimensions()[0] : 0;
  if (distances % 2 == 0) return invalid("offsets must be a matrix with an odd number of rows, from -reach to reach");
  if (stride < 1 || stride > kMostStride) {
    return invalid("stride=" + std::to_string(stride) +
                   " must be from 1 to 2^30, rows of the keys per row of the queries");
  }
  if (!fits("query_types", query_types, ffi::S32, {call.rows}, error) ||
      !fits("key_types", key_types, ffi::S32, {keys}, error) || !fits("biases", biases, dtype, {3, width}, error) ||
      !fits("offsets", offsets, dtype, {distances, width}, error) || !fits("same", same, dtype, {2, width}, error)) {
    return error;
  }
  call.query_types = static_cast<const int32_t*>(query_types.untyped_data());
  call.key_types = static_cast<const int32_t*>(key_types.untyped_data());
  call.biases = biases.untyped_data();
  call.offsets = offsets.untyped_data();
  call.same = same.untyped_data();
  call.reach = distances / 2;
  call.stride = stride;
  call.separate_first = separate_first;
  try {
    const Intervals intervals(call, keys, static_cast<const int32_t*>(lo.untyped_data()),
                              static_cast<const int32_t*>(hi.untyped_data()));
    make_tables_and_attend(pool, threads, call, dtype == ffi::BF16);
  } catch (const std::exception&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "funnel_native: no memory for attention");
  }
  return ffi::Error::Success();
}

}  // namespace

Handlers relative_attention_handlers() {
  XLA_FFI_DEFINE_HANDLER(relative_attention_handler, relative_attention,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("heads")
                             .Attr<float>("scale")
                             .Attr<int64_t>("stride")
                             .Attr<bool>("separate_first")
                             .Attr<int64_t>("threads"));
  return {{"funnel_relative_attention", relative_attention_handler}};
}

}  // namespace funnel
