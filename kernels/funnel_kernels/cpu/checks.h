// The checks that handlers make before they touch memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace funnel {

namespace ffi = xla::ffi;

inline bool is_float(ffi::DataType dtype) { return dtype == ffi::BF16 || dtype == ffi::F32; }

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("funnel_native: " + message);
}

// Whether a buffer has exactly this shape and dtype; if not, `error` says what is wrong.
template <typename Buffer>
bool fits(const char* name, const Buffer& buffer, ffi::DataType dtype, std::initializer_list<int64_t> shape,
          ffi::Error& error) {
  const auto found = buffer.dimensions();
  bool equal = found.size() == shape.size() && buffer.element_type() == dtype;
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = found[i] == shape.begin()[i];
  if (equal) return true;
  const auto text = [](auto begin, auto end) {
    std::string out = "[";
    for (auto at = begin; at != end; ++at) out += (at == begin ? "" : ", ") + std::to_string(*at);
    return out + "]";
  };
  error = invalid(std::string(name) + " has shape " + text(found.begin(), found.end()) + " and dtype " +
                  std::to_string(static_cast<int>(buffer.element_type())) + "; it must have shape " +
                  text(shape.begin(), shape.end()) + " and dtype " + std::to_string(static_cast<int>(dtype)));
  return false;
}

}  // namespace funnel
