// The XLA FFI handler of attention.
#include <cmath>
#include <exception>
#include <string>

#include "attention/native_cpu_tiles.h"
#include "cpu/handlers.h"

namespace funnel {
namespace {

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer lo,
                     ffi::AnyBuffer hi, ffi::Result<ffi::AnyBuffer> out, int64_t heads, int64_t kv_heads, float scale,
                     float softcap, int64_t threads) {
  ffi::Error error;
  Attention call{};
  if (!read_attention(q, k, v, lo, hi, *out, heads, kv_heads, scale, call, error)) return error;
  if (!std::isfinite(softcap) || softcap < 0) {
    return invalid("softcap=" + std::to_string(softcap) + " must be finite, and positive or 0 for none");
  }
  call.softcap = softcap;
  try {
    const Intervals intervals(call, k.dimensions()[0], static_cast<const int32_t*>(lo.untyped_data()),
                              static_cast<const int32_t*>(hi.untyped_data()));
    attend_tiles(pool, threads, call, FUNNEL_BEST(attention_kernels)(q.element_type() == ffi::BF16));
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
