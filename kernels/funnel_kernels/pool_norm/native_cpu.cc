// The handler of `pool_norm`; native_cpu_kernels.h says what it computes.
#include <iterator>

#include "cpu/factor.h"
#include "cpu/handlers.h"
#include "cpu/row_handlers.h"
#include "pool_norm/native_cpu_kernels.h"

namespace funnel {
namespace {

ffi::Error pool_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer real, ffi::AnyBuffer weight,
                     ffi::Result<ffi::AnyBuffer> pooled, ffi::Result<ffi::AnyBuffer> normed, int64_t stride,
                     int64_t pooling, float eps, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  Factor factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  if (stride < 1 || rows % stride != 0) return invalid("the stride must be positive and divide the rows of x");
  if (pooling < 0 || pooling >= static_cast<int64_t>(std::size(kPools))) return invalid("there is no such pool");
  const auto dtype = x.element_type();
  const int64_t windows = rows / stride;
  if (!fits("real", real, ffi::PRED, {rows}, error)) return error;
  if (!fits("the pooled rows", *pooled, dtype, {windows, width}, error)) return error;
  if (!fits("the normed rows", *normed, dtype, {windows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  const PoolNorm call = {x.untyped_data(),
                         static_cast<const uint8_t*>(real.untyped_data()),
                         factor.get(),
                         pooled->untyped_data(),
                         normed->untyped_data(),
                         width,
                         stride,
                         static_cast<Pool>(pooling),
                         eps,
                         dtype == ffi::BF16};
  by_parts(pool, threads, windows, width * (stride + 2) * size_of(dtype),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(pool_norm)(call, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

Handlers pool_norm_handlers() {
  XLA_FFI_DEFINE_HANDLER(pool_norm_handler, pool_norm,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("stride")
                             .Attr<int64_t>("pooling")
                             .Attr<float>("eps")
                             .Attr<int64_t>("threads"));
  return {{"funnel_pool_norm", pool_norm_handler}};
}

}  // namespace funnel
