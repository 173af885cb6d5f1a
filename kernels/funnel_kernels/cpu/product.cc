#include "cpu/product.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "cpu/caches.h"
#include "cpu/instruction_set.h"
#include "cpu/memory.h"
#include "cpu/onednn.h"
#include "cpu/parallel.h"
#include "cpu/product_avx512_bf16.h"
#include "cpu/product_int8.h"
#include "cpu/product_kernels.h"

namespace funnel {
namespace {

constexpr int64_t kTileRows = 128;  // with kTileUnits, a tile's float32 result takes 128 KB of a core's cache
constexpr int64_t kTileUnits = 4;
constexpr int64_t kFewestRows = 48;              // that make it worthwhile to read a tile's weights again
constexpr int64_t kTilesPerThread = 8;           // at least, so that threads finish together
constexpr int64_t kBlockRows = 6;                // that the kernels compute together
constexpr int64_t kQuantizedTogether = 1 << 15;  // elements of x: short inputs need no second thread

// Bytes that follow the machine's caches: 384 KB, 1.5 MB and 16 MB with caches of 1 MB and 32 MB.
int64_t tile_bytes() { return caches().core / 8 * 3; }    // of the result of a tile, unless it has kFewestRows
int64_t group_bytes() { return caches().core / 2 * 3; }   // of x in a group of tiles, see Tiling
int64_t cached_weights() { return caches().shared / 2; }  // of weights that stay in the cache that cores share
// The widest rows of which kFewestRows are a tile.
int64_t most_whole_columns() { return group_bytes() / (kFewestRows * static_cast<int64_t>(sizeof(float))); }

enum class Kernel { float32, bfloat16, int8, onednn };

std::atomic<bool> onednn_is_preferred{false};

Kernel kernel_for(const Product& product, InstructionSet set) {
  const bool has_amx = set == InstructionSet::amx || (onednn_is_preferred && set == InstructionSet::avx512_bf16);
  if (product.weights_dtype == Dtype::int8) return has_amx ? Kernel::onednn : Kernel::int8;
  const bool in_bfloat16 = product.is_bfloat16 && product.weights_dtype == Dtype::bfloat16 &&
                           set >= InstructionSet::avx512_bf16 && product.in_features % 2 == 0;
  return in_bfloat16 ? has_amx ? Kernel::onednn : Kernel::bfloat16 : Kernel::float32;
}

// The buffers that the calling thread has for its tiles.
enum Buffer { kTile, kRows = kTile + kMostParts, kPanelOfWeights, kBuffers };
Scratch& scratch(int64_t which) {
  thread_local Scratch buffers[kBuffers];
  return buffers[which];
}

bool stays_cached(const Product& product) { return product.parts * product.part_bytes() <= cached_weights(); }

// How a product is cut into tiles: nearly equal numbers of rows, and few enough columns that every thread gets tiles.
//
// Neighbouring tiles share columns and differ in rows. So weights that are too large for a cache are read from memory
// once for all rows. Where a cache holds them, rows are taken in groups that stay in a core's own cache from one column
// to the next: with 768 input features this is a tenth faster on 8192 rows.
struct Tiling {
  int64_t all_units, tile_units, column_tiles, row_tiles, tile_rows, group_tiles;

  Tiling(const Product& product, int64_t threads)
      : all_units(units_of(product.out_features)),
        tile_units(std::max(product.step, kTileUnits / product.step * product.step)) {
    const int64_t row_bytes = tile_units * kUnit * static_cast<int64_t>(sizeof(float));
    const int64_t most_rows = std::clamp(tile_bytes() / row_bytes, kFewestRows, kTileRows);
    const int64_t tiles = kTilesPerThread * clamp_threads(threads);
    row_tiles = (product.rows + most_rows - 1) / most_rows;
    while (tile_units > product.step && row_tiles * (all_units / tile_units) < tiles) tile_units -= product.step;
    column_tiles = (all_units + tile_units - 1) / tile_units;
    if (column_tiles == 1) row_tiles = std::max(row_tiles, std::min(tiles, product.rows / kFewestRows));
    tile_rows = (product.rows + row_tiles - 1) / row_tiles;
    if (row_tiles > 1) tile_rows = round_up(tile_rows, kBlockRows);
    row_tiles = (product.rows + tile_rows - 1) / tile_rows;  // rounding up may leave fewer
    const int64_t x_bytes = tile_rows * product.in_features * product.element();
    group_tiles = stays_cached(product) ? std::clamp<int64_t>(group_bytes() / x_bytes, 1, row_tiles) : row_tiles;
  }

  // The numbers of tile `index` among the tiles of rows and of columns.
  std::pair<int64_t, int64_t> tile_at(int64_t index) const {
    const int64_t group = index / (group_tiles * column_tiles) * group_tiles, in_group = index - group * column_tiles;
    const int64_t tiles = std::min(group_tiles, row_tiles - group);
    return {group + in_group % tiles, in_group / tiles};
  }
};

// x as the product reads it: as it is, or quantized, one tile after another.
struct Rows {
  int64_t row_bytes = 0, row_groups = 0;
  Memory values, scales;

  Rows(ffi::ThreadPool& pool, int64_t threads, const Product& product, InstructionSet set, const Tiling& tiling) {
    if (product.weights_dtype != Dtype::int8) return;
    row_bytes = FUNNEL_INT8_FORM(quantized_bytes, set)(product.in_features);
    row_groups = groups_of(product.in_features);
    values = allocate(static_cast<size_t>(product.rows * row_bytes));
    scales = allocate(static_cast<size_t>(product.rows * row_groups) * sizeof(float));
    const int64_t together = std::max<int64_t>(1, kQuantizedTogether / product.in_features);
    const int64_t parts = (tiling.tile_rows + together - 1) / together;  // of a tile
    parallel_for(pool, threads, tiling.row_tiles * parts, [&](int64_t index) {
      const int64_t row = index / parts * tiling.tile_rows, rows = std::min(tiling.tile_rows, product.rows - row);
      const int64_t first = index % parts * together, end = std::min(first + together, rows);
      FUNNEL_INT8_FORM(quantize, set)
      (product.row(row), product.is_bfloat16, first, end, rows, product.in_features, quantized(row));
    });
  }

  // Those of the tile that begins with this row.
  QuantizedRows quantized(int64_t row) const {
    return {static_cast<char*>(values.get()) + row * row_bytes, static_cast<float*>(scales.get()) + row * row_groups};
  }
};

// The products of a tile with each part of the weights, and their biases; `next_unit` is where the next tile's weights
// begin.
void multiply_tile(const Product& product, const Rows& rows_of_x, Kernel kernel, InstructionSet set, int64_t unit,
                   int64_t next_unit, Tile& tile) {
  const int64_t units = tile.stride / kUnit, rows = tile.rows, in_features = product.in_features;
  const auto packed = [&](int64_t part, int64_t of_unit) {
    return static_cast<const char*>(product.weights) + part * product.part_bytes() +
           of_unit * unit_bytes(in_features, product.weights_dtype);
  };
  const void* x = product.row(tile.row);
  const float* wide = static_cast<const float*>(x);
  if (kernel == Kernel::float32 && product.is_bfloat16) {
    auto* widened = scratch(kRows).at_least<float>(rows * in_features);
    FUNNEL_FORM(widen, set)(x, rows * in_features, widened);
    wide = widened;
  }
  const QuantizedRows quantized = rows_of_x.quantized(tile.row);
  for (int64_t part = 0; part < product.parts; ++part) {
    auto* result = scratch(kTile + part).at_least<float>(rows * tile.stride);
    const void* weights = packed(part, unit);
    const void* next = part + 1 < product.parts ? packed(part + 1, unit) : packed(0, next_unit);
    if (kernel == Kernel::float32) {
      FUNNEL_FORM(multiply_float32, set)
      (wide, rows, in_features, weights, product.weights_dtype == Dtype::bfloat16, units, next,
       scratch(kPanelOfWeights).at_least<float>(kPanel), result);
    } else if (kernel == Kernel::bfloat16) {
      avx512_bf16::multiply(x, rows, in_features, weights, units, next, result);
    } else if (kernel == Kernel::int8) {
      FUNNEL_INT8_FORM(multiply_int8, set)(quantized, rows, in_features, weights, units, next, result);
    } else if (product.weights_dtype == Dtype::int8) {
      onednn::multiply_int8(quantized, rows, in_features, weights, units, result);
    } else {
      onednn::multiply_bfloat16(x, rows, in_features, weights, units, result);
    }
    if (product.bias != nullptr) {
      const float* bias = product.bias + part * product.out_features + tile.column;
      FUNNEL_FORM(add_bias, set)(bias, rows, tile.columns, tile.stride, result);
    }
    tile.parts[part] = result;
  }
}

}  // namespace

ffi::Error by_tiles(ffi::ThreadPool& pool, int64_t threads, const Product& product,
                    const std::function<void(const Tile&)>& finish) {
  try {
    const InstructionSet set = instruction_set();  // asked once, because it may be limited meanwhile
    const Kernel kernel = kernel_for(product, set);
    const Tiling tiling(product, threads);
    const Rows rows_of_x(pool, threads, product, set, tiling);
    const int64_t tiles = tiling.row_tiles * tiling.column_tiles;
    std::atomic<bool> failed{false};

    parallel_for(pool, threads, tiles, [&](int64_t index) {
      try {
        const auto [row_tile, column_tile] = tiling.tile_at(index);
        const int64_t row = row_tile * tiling.tile_rows, unit = column_tile * tiling.tile_units;
        const int64_t rows = std::min(tiling.tile_rows, product.rows - row);
        const int64_t units = std::min(tiling.tile_units, tiling.all_units - unit);
        const int64_t column = unit * kUnit, columns = std::min(units * kUnit, product.out_features - column);
        // Threads take tiles in turns, so this thread's next tile is probably `threads` tiles further on.
        const int64_t next_tile = tiling.tile_at(std::min(index + clamp_threads(threads), tiles - 1)).second;
        Tile tile = {{}, units * kUnit, row, rows, column, columns};
        multiply_tile(product, rows_of_x, kernel, set, unit, next_tile * tiling.tile_units, tile);
        finish(tile);
      } catch (const std::exception&) {
        failed = true;
      }
    });
    if (failed) return ffi::Error::Internal("funnel_native: oneDNN or memory failed in a product");
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("funnel_native: no product: ") + error.what());
  }
}

bool suits_whole_rows(int64_t rows, int64_t out_features, int64_t in_features, Dtype weights, int64_t threads) {
  const Product product = {nullptr, nullptr, rows, in_features, out_features, 1, units_of(out_features),
                           false,   weights};
  return out_features % kUnit == 0 && out_features <= most_whole_columns() && stays_cached(product) &&
         rows >= kFewestRows * kTilesPerThread * clamp_threads(threads);
}

void prepare_product(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, Dtype weights,
                     int64_t step, int64_t threads) {
  const Product product = {nullptr, nullptr, rows, in_features, out_features, 1, step, is_bfloat16, weights};
  if (kernel_for(product, instruction_set()) != Kernel::onednn) return;
  const Tiling tiling(product, threads);
  for (const int64_t tile_rows : {tiling.tile_rows, rows - (tiling.row_tiles - 1) * tiling.tile_rows}) {
    for (const int64_t units : {tiling.tile_units, tiling.all_units - (tiling.column_tiles - 1) * tiling.tile_units}) {
      onednn::prepare(tile_rows, units, in_features, weights);
    }
  }
}

bool multiplies_bfloat16() { return instruction_set() >= InstructionSet::avx512_bf16; }

void prefer_onednn(bool preferred) { onednn_is_preferred = preferred; }

}  // namespace funnel
