// The handlers of the ops on whole rows; rows_kernels.h says what they compute.
#include <algorithm>
#include <string>

#include "checks.h"
#include "factor.h"
#include "handlers.h"
#include "parallel.h"
#include "rows_kernels.h"

namespace funnel {
namespace {

// What a thread takes at a time: enough that handing it out costs nothing, and that a call of a few rows wakes nobody.
constexpr int64_t kBytesPerTask = 128 * 1024;

// Runs body(begin, end) on parts of [0, count), whose items read and write so many bytes each.
template <typename Body>
void by_parts(ffi::ThreadPool& pool, int64_t threads, int64_t count, int64_t bytes_per_item, const Body& body) {
  const int64_t items = std::max<int64_t>(1, kBytesPerTask / bytes_per_item);
  parallel_for(pool, threads, (count + items - 1) / items,
               [&](int64_t part) { body(part * items, std::min(count, (part + 1) * items)); });
}

int64_t size_of(ffi::DataType dtype) { return dtype == ffi::BF16 ? 2 : 4; }

// Reads the shape of a matrix of float32 or bfloat16, which must not be empty.
bool read_matrix(const char* name, const ffi::AnyBuffer& matrix, int64_t& rows, int64_t& width, ffi::Error& error) {
  if (matrix.dimensions().size() != 2 || matrix.element_count() == 0 || !is_float(matrix.element_type())) {
    error = invalid(std::string(name) + " must be a matrix of float32 or bfloat16 with at least one element");
    return false;
  }
  rows = matrix.dimensions()[0], width = matrix.dimensions()[1];
  return true;
}

ffi::Error norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> normed,
                float eps, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  Factor factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  const auto dtype = x.element_type();
  if (!fits("the normed rows", *normed, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  const Norm all = {x.untyped_data(), factor.get(), normed->untyped_data(), width, eps, dtype == ffi::BF16};
  by_parts(pool, threads, rows, width * 2 * size_of(dtype),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(norm)(all, begin, end); });
  return ffi::Error::Success();
}

ffi::Error add_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer update, ffi::AnyBuffer weight,
                    ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> sum, ffi::Result<ffi::AnyBuffer> normed,
                    float eps, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  Factor factor, update_factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  const auto dtype = x.element_type();
  const auto update_dtype = update.element_type() == ffi::F32 ? ffi::F32 : dtype;
  if (!fits("update", update, update_dtype, {rows, width}, error)) return error;
  if (!fits("the sum", *sum, dtype, {rows, width}, error)) return error;
  if (!fits("the normed rows", *normed, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  if (!read_update_factor(rest, width, update_factor, error)) return error;
  const AddNorm all = {x.untyped_data(),
                       update.untyped_data(),
                       update_factor.get(),
                       factor.get(),
                       sum->untyped_data(),
                       normed->untyped_data(),
                       width,
                       eps,
                       dtype == ffi::BF16,
                       update_dtype == ffi::BF16};
  by_parts(pool, threads, rows, width * (3 * size_of(dtype) + size_of(update_dtype)),
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(add_norm)(all, begin, end); });
  return ffi::Error::Success();
}

ffi::Error pool_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer real, ffi::AnyBuffer weight,
                     ffi::Result<ffi::AnyBuffer> pooled, ffi::Result<ffi::AnyBuffer> normed, int64_t stride,
                     int64_t pooling, float eps, int64_t threads) {
  ffi::Error error;
  int64_t rows, width;
  Factor factor;
  if (!read_matrix("x", x, rows, width, error)) return error;
  if (stride < 1 || rows % stride != 0) return invalid("the stride must be positive and divide the rows of x");
  if (pooling < 0 || pooling > static_cast<int64_t>(Pool::first)) return invalid("there is no such pool");
  const auto dtype = x.element_type();
  const int64_t windows = rows / stride;
  if (!fits("real", real, ffi::PRED, {rows}, error)) return error;
  if (!fits("the pooled rows", *pooled, dtype, {windows, width}, error)) return error;
  if (!fits("the normed rows", *normed, dtype, {windows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  const PoolNorm all = {x.untyped_data(),
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
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(pool_norm)(all, begin, end); });
  return ffi::Error::Success();
}

ffi::Error recover_norm(ffi::ThreadPool pool, ffi::AnyBuffer short_rows, ffi::AnyBuffer weight,
                        ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, int64_t stride, int64_t mode,
                        bool after_norm, float eps, int64_t threads) {
  ffi::Error error;
  int64_t windows, rows, width;
  Factor factor;
  if (!read_matrix("short", short_rows, windows, width, error)) return error;
  if (!read_matrix("the result", *out, rows, width, error)) return error;
  if (stride < 1 || rows % stride != 0 || rows / stride != windows) {
    return invalid("the stride must be positive, and the result has so many rows for each short row");
  }
  if (mode < 0 || mode > static_cast<int64_t>(Mode::max)) return invalid("there is no such mode");
  const auto dtype = short_rows.element_type();
  if (!fits("the result", *out, dtype, {rows, width}, error)) return error;
  if (!read_factor("weight", weight, width, factor, error)) return error;
  const bool tile = static_cast<Mode>(mode) == Mode::tile;
  if (rest.size() != (tile ? 0 : 1)) return invalid("every mode but tile needs full-length rows, and tile takes none");
  const void* full = nullptr;
  auto full_dtype = dtype;
  if (!tile) {
    const auto given = rest.get<ffi::AnyBuffer>(0);
    if (given.has_error()) return given.error();
    if (is_float(given->element_type())) full_dtype = given->element_type();
    if (!fits("full", *given, full_dtype, {rows, width}, error)) return error;
    full = given->untyped_data();
  }
  const RecoverNorm all = {short_rows.untyped_data(),
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
           [&](int64_t begin, int64_t end) { FUNNEL_BEST(recover_norm)(all, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

Handlers rows_handlers() {
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
                             .Attr<int64_t>("threads"));
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
  return {{"funnel_norm", norm_handler},
          {"funnel_add_norm", add_norm_handler},
          {"funnel_pool_norm", pool_norm_handler},
          {"funnel_recover_norm", recover_norm_handler}};
}

}  // namespace funnel
