// Matrix products with packed weights, tile by tile: the operations that follow a product find its tile in the cache.
//
// One tile is computed at a time, on one thread, into a buffer that stays in the cache. A sum, a gate, a norm or
// rounding reads it there and writes the result. oneDNN computes tiles, or in bfloat16 with AVX-512 our own kernel does
// (product_avx512_bf16.h), on weights in the same layout. The threads are XLA's (parallel.h): oneDNN starts none.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "cpu/checks.h"
#include "cpu/product_avx512_bf16.h"  // kUnit

namespace funnel {

constexpr int64_t kMostParts = 2;  // products with the same x in one tile: a gate and what it gates

struct Product {
  const void* x;        // [rows, in_features]
  const void* weights;  // `parts` packed weights of out_features rows each, one after another
  int64_t rows, in_features, out_features, parts;
  int64_t step;  // units; a tile has a multiple of them, so that heads, or rows, are whole
  bool is_bfloat16;

  int64_t element() const { return is_bfloat16 ? 2 : 4; }  // bytes of one
};

// Rows and columns of a product, float32.
struct Tile {
  const float* parts[kMostParts];  // of the product with each part of the weights: [rows, columns]
  int64_t stride;                  // elements from row to row
  int64_t row, rows, column, columns;
};

// Computes a product tile by tile, on up to `threads` threads, and calls `finish` with each tile.
ffi::Error by_tiles(ffi::ThreadPool& pool, int64_t threads, const Product& product,
                    const std::function<void(const Tile&)>& finish);

// Whether a product can be cut into tiles of whole rows without loss of speed: our own kernel computes them (oneDNN's
// tiles have few columns), rows are whole units, every thread gets tiles, and the weights, which each tile reads, stay
// in a cache.
bool suits_whole_rows(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, int64_t threads);

// Lets oneDNN generate code for each shape of a tile of a product, so that the first call does not have to. `step` is
// that of `Product`. False if a tile cannot have `step` units.
bool prepare_product(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, int64_t step,
                     int64_t threads);

int64_t units_of(int64_t features);

// Elements that a packed weight takes.
int64_t packed_size(int64_t out_features, int64_t in_features, bool is_bfloat16);

// Packs rows of a weight, [out_features, in_features] elements one row after another: units of kUnit rows, each as
// oneDNN lays it out for its products.
void pack(const void* weight, int64_t out_features, int64_t in_features, bool is_bfloat16, void* packed);

// Why there is no fast product of this dtype on this machine; empty if there is one.
std::string no_product(bool is_bfloat16);

}  // namespace funnel
