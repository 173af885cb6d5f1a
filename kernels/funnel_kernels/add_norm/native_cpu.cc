// The handlers of `add_norm`, with an update and without one; native_cpu_kernels.h says what they compute.
#include "add_norm/native_cpu_kernels.h"
#include "cpu/factor.h"
#include "cpu/handlers.h"
#include "cpu/row_handlers.h"

namespace funnel {
namespace {

ffi::Error norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> normed,
                float eps, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  Factor factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  const auto dtype = x.element_type();
  if (!fits("the normed rows", *normed, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  const Norm call = {x.untyped_data(), factor.get(), normed->untyped_data(), width, eps, dtype == ffi::BF16};
  by_parts(pool, threads, rows, width * 2 * size_of(dtype),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(norm)(call, begin, end); });
  return ffi::Error::Success();
}

ffi::Error add_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer update, ffi::AnyBuffer weight,
                    ffi::RemainingArgs extras, ffi::Result<ffi::AnyBuffer> sum, ffi::Result<ffi::AnyBuffer> normed,
                    float eps, bool scaled, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  float scale;
  Factor factor, update_factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  const auto dtype = x.element_type();
  const auto update_dtype = update.element_type() == ffi::F32 ? ffi::F32 : dtype;
  if (!fits("update", update, update_dtype, {rows, width}, error)) return error;
  if (!fits("the sum", *sum, dtype, {rows, width}, error)) return error;
  if (!fits("the normed rows", *normed, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  if (!read_extras(extras, 0, scaled, width, update_factor, scale, error)) return error;
  const AddNorm call = {x.untyped_data(),
                        update.untyped_data(),
                        update_factor.get(),
                        factor.get(),
                        scale,
                        sum->untyped_data(),
                        normed->untyped_data(),
                        width,
                        eps,
                        dtype == ffi::BF16,
                        update_dtype == ffi::BF16};
  by_parts(pool, threads, rows, width * (3 * size_of(dtype) + size_of(update_dtype)),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(add_norm)(call, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

Handlers add_norm_handlers() {
  XLA_FFI_DEFINE_HANDLER(norm_handler, norm,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<float>("eps")
                             .Attr<int64_t>("threads"));
  XLA_FFI_DEFINE_HANDLER(add_norm_handler, add_norm,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<float>("eps")
                             .Attr<bool>("scaled")
                             .Attr<int64_t>("threads"));
  return {{"funnel_norm", norm_handler}, {"funnel_add_norm", add_norm_handler}};
}

}  // namespace funnel
