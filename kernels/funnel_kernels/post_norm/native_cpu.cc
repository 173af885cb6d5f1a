// The handler of `post_norm`; native_cpu_kernels.h says what it computes.
#include "cpu/factor.h"
#include "cpu/handlers.h"
#include "cpu/row_handlers.h"
#include "post_norm/native_cpu_kernels.h"

namespace funnel {
namespace {

ffi::Error post_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer added,
                     ffi::RemainingArgs updates, ffi::Result<ffi::AnyBuffer> normed, float eps, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  Factor factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  const auto dtype = x.element_type();
  if (!fits("the normed rows", *normed, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  if (!fits("what the norm adds", added, ffi::F32, {width}, error)) return error;
  if (updates.size() > 1) return invalid("a norm has at most one update");
  PostNorm call = {x.untyped_data(),
                   nullptr,
                   factor.get(),
                   static_cast<const float*>(added.untyped_data()),
                   normed->untyped_data(),
                   width,
                   eps,
                   dtype == ffi::BF16,
                   false};
  if (updates.size() == 1) {
    const auto update = updates.get<ffi::AnyBuffer>(0);
    if (update.has_error()) return update.error();
    const auto update_dtype = update->element_type() == ffi::F32 ? ffi::F32 : dtype;
    if (!fits("update", *update, update_dtype, {rows, width}, error)) return error;
    call.update = update->untyped_data();
    call.update_is_bfloat16 = update_dtype == ffi::BF16;
  }
  by_parts(pool, threads, rows, width * (2 * size_of(dtype) + (call.update ? sizeof(float) : 0)),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(post_norm)(call, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

Handlers post_norm_handlers() {
  XLA_FFI_DEFINE_HANDLER(post_norm_handler, post_norm,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<float>("eps")
                             .Attr<int64_t>("threads"));
  return {{"funnel_post_norm", post_norm_handler}};
}

}  // namespace funnel
