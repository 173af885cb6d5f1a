// Matrix products with weights that are packed once: oneDNN on tiles, and what follows the product on the same tile.
//
// oneDNN computes one tile at a time, on one thread, into a buffer that stays in the cache; what follows (a sum, a gate,
// rounding) reads it there and writes the result. The threads are XLA's (parallel.h): oneDNN starts none of its own.
// On two Zen 4 cores this is as fast as oneDNN's own product over all threads, and the gate comes for free. Few rows in
// bfloat16 have a kernel of their own (multiply_few), on weights in the same layout.
#pragma once

#include <cstdint>
#include <string>

namespace funnel {

// Weights [out_features, in_features] are packed in units of so many rows, each of which oneDNN has laid out for its
// products. The last unit is filled up with zeros.
constexpr int64_t kUnit = 64;

// Elements that a packed weight takes.
int64_t packed_size(int64_t out_features, int64_t in_features, bool is_bfloat16);

// Packs rows of a weight, [out_features, in_features] elements one row after another.
void pack(const void* weight, int64_t out_features, int64_t in_features, bool is_bfloat16, void* packed);

// Makes what oneDNN needs for a product, so that its first call does not have to: code for each shape of a tile.
// `step`: a tile has a multiple of so many units. False if oneDNN's tiles cannot have so many.
bool prepare_product(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, int64_t step,
                     int64_t threads);

// Why oneDNN has no fast product of this dtype on this machine; empty if it has one.
std::string no_product(bool is_bfloat16);

}  // namespace funnel
