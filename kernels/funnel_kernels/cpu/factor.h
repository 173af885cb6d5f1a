// How handlers read a norm's factor from its weight.
#pragma once

#include <memory>
#include <new>

#include "cpu/checks.h"
#include "cpu/factor_kernels.h"

namespace funnel {

using Factor = std::unique_ptr<float[]>;

// 1 + weight in float32, for a weight [width] of float32 or bfloat16.
inline bool read_factor(const char* name, const ffi::AnyBuffer& weight, int64_t width, Factor& factor,
                        ffi::Error& error) {
  const auto dtype = weight.element_type();
  if (!fits(name, weight, is_float(dtype) ? dtype : ffi::F32, {width}, error)) return false;
  factor.reset(new (std::nothrow) float[width]);
  if (factor == nullptr) {
    error = ffi::Error(ffi::ErrorCode::kResourceExhausted, "funnel_native: no memory for a norm's weight");
    return false;
  }
  FUNNEL_BEST(make_factor)(weight.untyped_data(), dtype == ffi::BF16, width, factor.get());
  return true;
}

// The same for the norm of an update, if there is one; otherwise the factor stays null.
inline bool read_update_factor(ffi::RemainingArgs& weights, int64_t width, Factor& factor, ffi::Error& error) {
  if (weights.size() > 1) return error = invalid("an update has at most one norm"), false;
  if (weights.size() == 0) return true;
  const auto weight = weights.get<ffi::AnyBuffer>(0);
  if (weight.has_error()) return error = weight.error(), false;
  return read_factor("update_weight", *weight, width, factor, error);
}

}  // namespace funnel
