#include "cpu/product.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/caches.h"
#include "cpu/instruction_set.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "oneapi/dnnl/dnnl.hpp"

namespace funnel {
namespace {

constexpr int64_t kTileRows = 128;  // with kTileUnits, a tile's float32 result takes 128 KB of a core's cache
constexpr int64_t kTileUnits = 4;
constexpr int64_t kFewestRows = 48;      // that make it worthwhile to read a tile's weights again
constexpr int64_t kTilesPerThread = 4;   // at least, so that threads finish together
constexpr int kScratchpad = kMostParts;  // which of a thread's buffers is oneDNN's; those before it hold tiles

// Bytes that follow the machine's caches: 384 KB, 1.5 MB and 16 MB with caches of 1 MB and 32 MB.
int64_t tile_bytes() { return caches().core / 8 * 3; }    // of the result of a tile, unless it has kFewestRows
int64_t group_bytes() { return caches().core / 2 * 3; }   // of x in a group of tiles, see Tiling
int64_t cached_weights() { return caches().shared / 2; }  // of weights that stay in the cache that cores share
// The widest rows of which kFewestRows are a tile.
int64_t most_whole_columns() { return group_bytes() / (kFewestRows * static_cast<int64_t>(sizeof(float))); }

// oneDNN was built with OpenMP and would start a team of its own.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

const dnnl::engine& cpu() {
  static const auto& engine = *new dnnl::engine(dnnl::engine::kind::cpu, 0);  // never destroyed: threads may run on
  return engine;
}

dnnl::memory::data_type onednn_type(bool is_bfloat16) {
  return is_bfloat16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

// The product of a tile: [rows, in_features] times `units` packed units, into a dense float32 [rows, units * kUnit].
struct TileProduct {
  dnnl::matmul::primitive_desc description;
  dnnl::matmul product;

  TileProduct(int64_t rows, int64_t units, int64_t in_features, bool is_bfloat16, const dnnl::memory::desc& weights) {
    using dnnl::memory;
    OneThread one_thread;
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    description = dnnl::matmul::primitive_desc(
        cpu(), memory::desc({rows, in_features}, onednn_type(is_bfloat16), memory::format_tag::ab), weights,
        memory::desc({rows, units * kUnit}, memory::data_type::f32, memory::format_tag::ab), attributes);
    product = dnnl::matmul(description);
  }

  void run(const void* rows, const void* weights, float* tile, void* scratchpad) const {
    thread_local const dnnl::stream stream(cpu());
    thread_local std::unordered_map<const TileProduct*, Operands> known;
    auto found = known.find(this);
    if (found == known.end()) found = known.emplace(this, Operands(description)).first;
    found->second.point_to(rows, weights, tile, scratchpad);
    OneThread one_thread;
    product.execute(stream, found->second.arguments);
  }

  size_t scratchpad_bytes() const { return description.scratchpad_desc().get_size(); }

 private:
  // What oneDNN reads and writes, made once: for a tile of few rows this takes a tenth of the product's time.
  struct Operands {
    std::unordered_map<int, dnnl::memory> arguments;

    explicit Operands(const dnnl::matmul::primitive_desc& of)
        : arguments{{DNNL_ARG_SRC, memory(of.src_desc())},
                    {DNNL_ARG_WEIGHTS, memory(of.weights_desc())},
                    {DNNL_ARG_DST, memory(of.dst_desc())},
                    {DNNL_ARG_SCRATCHPAD, memory(of.scratchpad_desc())}} {}

    void point_to(const void* rows, const void* weights, float* tile, void* scratchpad) {
      arguments[DNNL_ARG_SRC].set_data_handle(const_cast<void*>(rows));
      arguments[DNNL_ARG_WEIGHTS].set_data_handle(const_cast<void*>(weights));
      arguments[DNNL_ARG_DST].set_data_handle(tile);
      arguments[DNNL_ARG_SCRATCHPAD].set_data_handle(scratchpad);
    }

    static dnnl::memory memory(const dnnl::memory::desc& description) {
      return dnnl::memory(description, cpu(), DNNL_MEMORY_NONE);
    }
  };
};

dnnl::memory::desc any_layout(int64_t in_features, int64_t units, bool is_bfloat16) {
  return {{in_features, units * kUnit}, onednn_type(is_bfloat16), dnnl::memory::format_tag::any};
}

// The layout of one packed unit: what oneDNN prefers for a full tile.
dnnl::memory::desc unit_layout(int64_t in_features, bool is_bfloat16) {
  const TileProduct tile(kTileRows, 1, in_features, is_bfloat16, any_layout(in_features, 1, is_bfloat16));
  return tile.description.weights_desc();
}

int64_t elements(const dnnl::memory::desc& layout, bool is_bfloat16) {
  return static_cast<int64_t>(layout.get_size()) / (is_bfloat16 ? 2 : 4);
}

// The layout of `units` packed units one after another, if oneDNN prefers it for a tile of that many; otherwise empty.
dnnl::memory::desc joined_layout(int64_t in_features, int64_t units, bool is_bfloat16) {
  const dnnl::memory::desc unit = unit_layout(in_features, is_bfloat16);
  if (units == 1) return unit;
  const TileProduct tile(kTileRows, units, in_features, is_bfloat16, any_layout(in_features, units, is_bfloat16));
  const dnnl::memory::desc several = tile.description.weights_desc();
  const bool joins =
      several.get_inner_blks() == unit.get_inner_blks() && several.get_inner_idxs() == unit.get_inner_idxs() &&
      several.get_padded_dims()[0] == unit.get_padded_dims()[0] && several.get_strides()[0] == unit.get_strides()[0] &&
      several.get_strides()[1] == elements(unit, is_bfloat16);
  return joins ? several : dnnl::memory::desc();
}

// Whether a packed unit is [in_features / 2, kUnit, 2] without padding, as our own kernel reads it.
bool is_in_pairs(const dnnl::memory::desc& unit, int64_t in_features) {
  return in_features % 32 == 0 && unit.get_inner_blks() == dnnl::memory::dims{16, kUnit, 2} &&
         unit.get_inner_idxs() == dnnl::memory::dims{0, 1, 0} && unit.get_strides()[0] == 32 * kUnit;
}

// What does not change with the number of rows.
struct Weights {
  int64_t unit_elements;
  std::vector<dnnl::memory::desc> layouts;  // of 1, 2, ... units; as many as can be read as one
  bool in_pairs;
};

// Found once for each number of input features.
const Weights& weights_of(int64_t in_features, bool is_bfloat16) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<int64_t, bool>, Weights>;  // never destroyed, as the engine
  std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(in_features, is_bfloat16);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  Weights weights{0, {}, false};
  for (int64_t units = 1; units <= kTileUnits; ++units) {
    const dnnl::memory::desc layout = joined_layout(in_features, units, is_bfloat16);
    if (layout.is_zero()) break;
    weights.layouts.push_back(layout);
  }
  weights.unit_elements = elements(weights.layouts[0], is_bfloat16);
  weights.in_pairs = is_bfloat16 && is_in_pairs(weights.layouts[0], in_features);
  return known.emplace(key, std::move(weights)).first->second;
}

// Whether our own kernel computes the tiles. With AMX oneDNN does, because our kernel does not use it.
bool uses_our_kernel(const Weights& weights) {
  return weights.in_pairs && instruction_set() == InstructionSet::avx512_bf16;
}

// Products are made once for each shape of a tile. There are at most a few hundred, since the engine has few buckets.
const TileProduct& tile_product(int64_t rows, int64_t units, int64_t in_features, bool is_bfloat16) {
  static std::shared_mutex mutex;
  static auto& products = *new std::map<std::tuple<int64_t, int64_t, int64_t, bool>, std::unique_ptr<TileProduct>>;
  const auto key = std::make_tuple(rows, units, in_features, is_bfloat16);
  {
    std::shared_lock<std::shared_mutex> lock(mutex);
    const auto found = products.find(key);
    if (found != products.end()) return *found->second;
  }
  const dnnl::memory::desc& layout = weights_of(in_features, is_bfloat16).layouts[units - 1];
  auto made = std::make_unique<TileProduct>(rows, units, in_features, is_bfloat16, layout);
  std::unique_lock<std::shared_mutex> lock(mutex);
  return *products.emplace(key, std::move(made)).first->second;
}

// One of the buffers that the calling thread has for its tiles.
Scratch& scratch(int64_t which) {
  thread_local Scratch buffers[kScratchpad + 1];
  return buffers[which];
}

// The largest multiple of `step` units that a tile can have; 0 if a tile cannot have `step` units.
int64_t most_units(const Weights& weights, int64_t step, bool ours) {
  if (ours) return std::max(step, kTileUnits / step * step);
  return static_cast<int64_t>(weights.layouts.size()) / step * step;
}

bool stays_cached(const Product& product, const Weights& weights) {
  const int64_t elements = product.parts * units_of(product.out_features) * weights.unit_elements;
  return elements * product.element() <= cached_weights();
}

// How a product is cut into tiles: nearly equal numbers of rows, and few enough columns that every thread gets tiles.
//
// Neighbouring tiles share columns and differ in rows. So weights that are too large for a cache are read from memory
// once for all rows. Where a cache holds them, rows are taken in groups that stay in a core's own cache from one column
// to the next: with 768 input features this is a tenth faster on 8192 rows.
struct Tiling {
  bool ours;  // asked once, because the instruction set may be limited meanwhile
  int64_t all_units, tile_units, column_tiles = 0, row_tiles = 0, tile_rows = 0, group_tiles = 0;

  // tile_units is 0, and there are no tiles, if a tile cannot have the product's step.
  Tiling(const Product& product, const Weights& weights, int64_t threads)
      : ours(uses_our_kernel(weights)),
        all_units(units_of(product.out_features)),
        tile_units(most_units(weights, product.step, ours)) {
    if (tile_units == 0) return;
    const int64_t row_bytes = tile_units * kUnit * static_cast<int64_t>(sizeof(float));
    const int64_t most_rows = std::clamp(tile_bytes() / row_bytes, kFewestRows, kTileRows);
    const int64_t tiles = kTilesPerThread * clamp_threads(threads);
    row_tiles = (product.rows + most_rows - 1) / most_rows;
    while (tile_units > product.step && row_tiles * (all_units / tile_units) < tiles) tile_units -= product.step;
    column_tiles = (all_units + tile_units - 1) / tile_units;
    if (column_tiles == 1) row_tiles = std::max(row_tiles, std::min(tiles, product.rows / kFewestRows));
    tile_rows = (product.rows + row_tiles - 1) / row_tiles;
    row_tiles = (product.rows + tile_rows - 1) / tile_rows;  // rounding up may leave fewer
    const int64_t x_bytes = tile_rows * product.in_features * product.element();
    const bool cached = stays_cached(product, weights);
    group_tiles = cached ? std::clamp<int64_t>(group_bytes() / x_bytes, 1, row_tiles) : row_tiles;
  }

  // The numbers of tile `index` among the tiles of rows and of columns.
  std::pair<int64_t, int64_t> tile_at(int64_t index) const {
    const int64_t group = index / (group_tiles * column_tiles) * group_tiles, in_group = index - group * column_tiles;
    const int64_t tiles = std::min(group_tiles, row_tiles - group);
    return {group + in_group % tiles, in_group / tiles};
  }
};

// The products of a tile with each part of the weights; `next_unit` is where the next tile's weights begin.
void multiply_tile(const Product& product, const Weights& weights, bool ours, int64_t unit, int64_t next_unit,
                   Tile& tile) {
  const int64_t units = tile.stride / kUnit;
  const auto packed = [&](int64_t part, int64_t of_unit) {
    const int64_t first = (part * units_of(product.out_features) + of_unit) * weights.unit_elements;
    return static_cast<const char*>(product.weights) + first * product.element();
  };
  const char* x = static_cast<const char*>(product.x) + tile.row * product.in_features * product.element();
  const TileProduct* onednn =
      ours ? nullptr : &tile_product(tile.rows, units, product.in_features, product.is_bfloat16);
  for (int64_t part = 0; part < product.parts; ++part) {
    auto* result = scratch(part).at_least<float>(tile.rows * tile.stride);
    if (ours) {
      const char* next = part + 1 < product.parts ? packed(part + 1, unit) : packed(0, next_unit);
      avx512_bf16::multiply(x, tile.rows, product.in_features, packed(part, unit), units, next, result);
    } else {
      onednn->run(x, packed(part, unit), result, scratch(kScratchpad).at_least<char>(onednn->scratchpad_bytes()));
    }
    tile.parts[part] = result;
  }
}

}  // namespace

ffi::Error by_tiles(ffi::ThreadPool& pool, int64_t threads, const Product& product,
                    const std::function<void(const Tile&)>& finish) {
  try {
    const Weights& weights = weights_of(product.in_features, product.is_bfloat16);
    const Tiling tiling(product, weights, threads);
    if (tiling.tile_units == 0) return invalid("a whole head, or row, does not fit into a tile");
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
        multiply_tile(product, weights, tiling.ours, unit, next_tile * tiling.tile_units, tile);
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

bool suits_whole_rows(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, int64_t threads) {
  if (!no_product(is_bfloat16).empty()) return false;
  const Weights& weights = weights_of(in_features, is_bfloat16);
  const Product product = {nullptr, nullptr, rows, in_features, out_features, 1, units_of(out_features), is_bfloat16};
  return uses_our_kernel(weights) && out_features % kUnit == 0 && out_features <= most_whole_columns() &&
         stays_cached(product, weights) && rows >= kFewestRows * kTilesPerThread * clamp_threads(threads);
}

bool prepare_product(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, int64_t step,
                     int64_t threads) {
  const Weights& weights = weights_of(in_features, is_bfloat16);
  const Tiling tiling({nullptr, nullptr, rows, in_features, out_features, 1, step, is_bfloat16}, weights, threads);
  if (tiling.tile_units == 0) return false;
  if (tiling.ours) return true;
  for (const int64_t tile_rows : {tiling.tile_rows, rows - (tiling.row_tiles - 1) * tiling.tile_rows}) {
    for (const int64_t units : {tiling.tile_units, tiling.all_units - (tiling.column_tiles - 1) * tiling.tile_units}) {
      tile_product(tile_rows, units, in_features, is_bfloat16);
    }
  }
  return true;
}

int64_t units_of(int64_t features) { return (features + kUnit - 1) / kUnit; }

int64_t packed_size(int64_t out_features, int64_t in_features, bool is_bfloat16) {
  return units_of(out_features) * weights_of(in_features, is_bfloat16).unit_elements;
}

void pack(const void* weight, int64_t out_features, int64_t in_features, bool is_bfloat16, void* packed) {
  OneThread one_thread;
  const int64_t element = is_bfloat16 ? 2 : 4;
  const Weights& weights = weights_of(in_features, is_bfloat16);
  const dnnl::memory::desc plain({in_features, kUnit}, onednn_type(is_bfloat16), dnnl::memory::format_tag::ba);
  const dnnl::reorder reorder(dnnl::reorder::primitive_desc(cpu(), plain, cpu(), weights.layouts[0]));
  dnnl::stream stream(cpu());
  std::vector<char> last;
  for (int64_t first = 0; first < out_features; first += kUnit) {
    const char* from = static_cast<const char*>(weight) + first * in_features * element;
    if (out_features - first < kUnit) {
      last.resize(kUnit * in_features * element);
      std::copy_n(from, (out_features - first) * in_features * element, last.begin());
      from = last.data();
    }
    const dnnl::memory source(plain, cpu(), const_cast<char*>(from));
    dnnl::memory target(weights.layouts[0], cpu(),
                        static_cast<char*>(packed) + first / kUnit * weights.unit_elements * element);
    reorder.execute(stream, const_cast<dnnl::memory&>(source), target);
  }
  stream.wait();
}

std::string no_product(bool is_bfloat16) {
  if (instruction_set() == InstructionSet::none) return "the processor has no AVX2";
  static const std::array<std::string, 2> reasons = [] {
    std::array<std::string, 2> found;
    for (const bool bfloat16 : {false, true}) {
      std::string name;
      try {
        name = TileProduct(kTileRows, 1, 1024, bfloat16, any_layout(1024, 1, bfloat16)).description.impl_info_str();
      } catch (const dnnl::error&) {  // it has no product of this dtype at all
      }
      if (name.rfind("brg:", 0) != 0) {
        found[bfloat16] = std::string("oneDNN has no blocked product of ") + (bfloat16 ? "bfloat16" : "float32") +
                          " for this processor" + (name.empty() ? "" : " (it would run " + name + ")");
      }
    }
    return found;
  }();
  return reasons[is_bfloat16];
}

}  // namespace funnel
