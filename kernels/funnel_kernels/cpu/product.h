// Matrix products with packed weights, tile by tile: the operations that follow a product find its tile in the cache.
//
// One tile is computed at a time, on one thread, into a buffer that stays in the cache. A sum, a gate, a norm or
// rounding reads it there and writes the result. The threads are XLA's (parallel.h).
//
// x            weights    kernel                    processors
// float32      float32    product_kernels.h         all, with AVX2
// any          bfloat16   product_kernels.h         all; weights, and a tile's rows of x, are widened
// bfloat16     bfloat16   product_avx512_bf16.h     with AVX-512-BF16
// any          int8       product_int8.h            all; faster with VNNI
// as in the last two      onednn.h                  with AMX
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/checks.h"
#include "cpu/packed_weight.h"

namespace funnel {

constexpr int64_t kMostParts = 2;  // products with the same x in one tile: a gate and what it gates

struct Product {
  const void* x;        // [rows, in_features]
  const void* weights;  // `parts` packed weights of out_features rows each, one after another
  int64_t rows, in_features, out_features, parts;
  int64_t step;      // units; a tile has a multiple of them, so that heads, or rows, are whole
  bool is_bfloat16;  // x, and what is made of the tiles; else float32
  Dtype weights_dtype;
  const float* bias = nullptr;  // [parts * out_features], added to the products; null adds nothing

  int64_t element() const { return is_bfloat16 ? 2 : 4; }  // bytes of one of x
  const void* row(int64_t of_x) const { return static_cast<const char*>(x) + of_x * in_features * element(); }
  int64_t part_bytes() const { return units_of(out_features) * unit_bytes(in_features, weights_dtype); }
};

// Rows and columns of a product, float32.
struct Tile {
  const float* parts[kMostParts];  // of the product with each part of the weights, plus its bias: [rows, columns]
  int64_t stride;                  // elements from row to row
  int64_t row, rows, column, columns;
};

// Computes a product tile by tile, on up to `threads` threads, and calls `finish` with each tile.
ffi::Error by_tiles(ffi::ThreadPool& pool, int64_t threads, const Product& product,
                    const std::function<void(const Tile&)>& finish);

// Whether a product can be cut into tiles of whole rows without loss of speed: rows are whole units, every thread gets
// tiles, and the weights, which each tile reads, stay in a cache.
bool suits_whole_rows(int64_t rows, int64_t out_features, int64_t in_features, Dtype weights, int64_t threads);

// Lets oneDNN, if it computes this product, generate its code, so that the first call does not have to.
void prepare_product(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, Dtype weights,
                     int64_t step, int64_t threads);

// Whether this processor multiplies bfloat16 faster than float32.
bool multiplies_bfloat16();

// Lets oneDNN compute what it would on a processor with AMX, for tests on others.
void prefer_onednn(bool preferred);

}  // namespace funnel
