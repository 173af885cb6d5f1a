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

// The operands of a sum from number `first` on: the weight of a norm of the update, whose factor is null without it,
// and, if `scaled`, the scale of the sum, which is 1 without it.
inline bool read_extras(ffi::RemainingArgs& extras, size_t first, bool scaled, int64_t width, Factor& update_factor,
                        float& scale, ffi::Error& error) {
  const size_t scales = scaled ? 1 : 0, norms = extras.size() - first - scales;
  if (extras.size() < first + scales || norms > 1) {
    return error = invalid("a sum has at most one norm of the update, and a scale if `scaled` says so"), false;
  }
  if (norms == 1) {
    const auto weight = extras.get<ffi::AnyBuffer>(first);
    if (weight.has_error()) return error = weight.error(), false;
    if (!read_factor("update_weight", *weight, width, update_factor, error)) return false;
  }
  scale = 1;
  if (scaled) {
    const auto array = extras.get<ffi::AnyBuffer>(first + norms);
    if (array.has_error()) return error = array.error(), false;
    if (!fits("scale", *array, ffi::F32, {1}, error)) return false;
    scale = *static_cast<const float*>(array->untyped_data());
  }
  return true;
}

}  // namespace funnel
