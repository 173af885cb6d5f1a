// The handler of `recover_norm`; native_cpu_kernels.h says what it computes.
#include <iterator>

#include "cpu/factor.h"
#include "cpu/handlers.h"
#include "cpu/row_handlers.h"
#include "recover_norm/native_cpu_kernels.h"

namespace funnel {
namespace {

ffi::Error recover_norm(ffi::ThreadPool pool, ffi::AnyBuffer short_rows, ffi::AnyBuffer weight,
                        ffi::RemainingArgs full_rows, ffi::Result<ffi::AnyBuffer> out, int64_t stride, int64_t mode,
                        bool after_norm, float eps, int64_t threads) {
  ffi::Error error;
  int64_t windows, rows, width;
  Factor factor;
  if (!read_matrix("short", short_rows, windows, width, error)) return error;
  if (!read_matrix("the result", *out, rows, width, error)) return error;
  if (stride < 1 || rows % stride != 0 || rows / stride != windows) {
    return invalid("the stride must be positive, and the result must have `stride` rows for each short row");
  }
  if (mode < 0 || mode >= static_cast<int64_t>(std::size(kModes))) return invalid("there is no such mode");
  const auto dtype = short_rows.element_type();
  if (!fits("the result", *out, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  const bool tile = static_cast<Mode>(mode) == Mode::tile;
  if (full_rows.size() != (tile ? 0 : 1))
    return invalid("every mode but tile needs full-length rows, and tile takes none");
  const void* full = nullptr;
  auto full_dtype = dtype;
  if (!tile) {
    const auto given = full_rows.get<ffi::AnyBuffer>(0);
    if (given.has_error()) return given.error();
    if (is_float(given->element_type())) full_dtype = given->element_type();
    if (!fits("full", *given, full_dtype, {rows, width}, error)) return error;
    full = given->untyped_data();
  }
  const RecoverNorm call = {short_rows.untyped_data(),
                            full,
                            factor.get(),
                            out->untyped_data(),
                            width,
                            stride,
                            static_cast<Mode>(mode),
                            after_norm,
                            eps,
                            dtype == ffi::BF16,
                            full_dtype == ffi::BF16};
  by_parts(pool, threads, windows, width * (size_of(dtype) * (stride + 1) + size_of(full_dtype) * stride),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(recover_norm)(call, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

Handlers recover_norm_handlers() {
  XLA_FFI_DEFINE_HANDLER(recover_norm_handler, recover_norm,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("stride")
                             .Attr<int64_t>("mode")
                             .Attr<bool>("after_norm")
                             .Attr<float>("eps")
                             .Attr<int64_t>("threads"));
  return {{"funnel_recover_norm", recover_norm_handler}};
}

}  // namespace funnel
