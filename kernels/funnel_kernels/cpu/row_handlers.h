// What the handlers of add_norm, pool_norm, post_norm and recover_norm share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "cpu/checks.h"
#include "cpu/parallel.h"

namespace funnel {

// What a thread takes at a time. Handing out this much costs little, and a call of a few rows wakes no other thread.
constexpr int64_t kBytesPerTask = 128 * 1024;

// Runs body(begin, end) on parts of [0, count). Each item reads and writes `bytes_per_item`.
template <typename Body>
void by_parts(ffi::ThreadPool& pool, int64_t threads, int64_t count, int64_t bytes_per_item, const Body& body) {
  const int64_t items = std::max<int64_t>(1, kBytesPerTask / bytes_per_item);
  parallel_for(pool, threads, (count + items - 1) / items,
               [&](int64_t part) { body(part * items, std::min(count, (part + 1) * items)); });
}

inline int64_t size_of(ffi::DataType dtype) { return dtype == ffi::BF16 ? 2 : 4; }

// Reads the shape of a matrix of float32 or bfloat16, which must not be empty.
inline bool read_matrix(const char* name, const ffi::AnyBuffer& matrix, int64_t& rows, int64_t& width,
                        ffi::Error& error) {
  if (matrix.dimensions().size() != 2 || matrix.element_count() == 0 || !is_float(matrix.element_type())) {
    error = invalid(std::string(name) + " must be a matrix of float32 or bfloat16 with at least one element");
    return false;
  }
  rows = matrix.dimensions()[0], width = matrix.dimensions()[1];
  return true;
}

}  // namespace funnel
