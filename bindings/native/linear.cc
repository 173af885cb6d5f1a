#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"
#include "handlers.h"
#include "linear_kernels.h"
#include "memory.h"
#include "oneapi/dnnl/dnnl.hpp"
#include "parallel.h"
#include "rows_kernels.h"

namespace funnel {
namespace {

constexpr int64_t kTileRows = 128;   // with kTileUnits, a tile's float32 result takes 128 KB of a core's cache
constexpr int64_t kTileUnits = 4;
constexpr int64_t kTilesPerThread = 4;  // at least, so that threads finish together
constexpr int64_t kCachedWeights = int64_t{16} << 20;  // bytes of weights that stay in the cache that cores share
constexpr int64_t kGroupBytes = int64_t{3} << 19;      // of x in a group of tiles, see Tiling
constexpr int64_t kMostParts = 2;       // products with the same x that one tile needs: a gate and what it gates
constexpr int64_t kMostFeatures = int64_t{1} << 24;  // so that no size overflows
constexpr int64_t kFewRows = 48;        // up to which a product is multiply_few's
constexpr int kScratchpad = kMostParts;  // which of a thread's buffers is oneDNN's; those before it hold tiles

// oneDNN was built with OpenMP and would start a team of its own.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
};

const dnnl::engine& cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
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
    product.execute(stream, found->second.arguments);
  }

  size_t scratchpad_bytes() const { return description.scratchpad_desc().get_size(); }

 private:
  // What oneDNN reads and writes, made once: for a tile of few rows, making them takes as long as a tenth of the product.
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
  OneThread one_thread;
  const TileProduct tile(kTileRows, 1, in_features, is_bfloat16, any_layout(in_features, 1, is_bfloat16));
  return tile.description.weights_desc();
}

int64_t elements(const dnnl::memory::desc& layout, bool is_bfloat16) {
  return static_cast<int64_t>(layout.get_size()) / (is_bfloat16 ? 2 : 4);
}

// The layout of `units` packed units one after another, if that is what oneDNN prefers for a tile of so many; else empty.
dnnl::memory::desc joined_layout(int64_t in_features, int64_t units, bool is_bfloat16) {
  const dnnl::memory::desc unit = unit_layout(in_features, is_bfloat16);
  if (units == 1) return unit;
  OneThread one_thread;
  const TileProduct tile(kTileRows, units, in_features, is_bfloat16, any_layout(in_features, units, is_bfloat16));
  const dnnl::memory::desc several = tile.description.weights_desc();
  const bool joins = several.get_inner_blks() == unit.get_inner_blks() &&
                     several.get_inner_idxs() == unit.get_inner_idxs() &&
                     several.get_padded_dims()[0] == unit.get_padded_dims()[0] &&
                     several.get_strides()[0] == unit.get_strides()[0] &&
                     several.get_strides()[1] == elements(unit, is_bfloat16);
  return joins ? several : dnnl::memory::desc();
}

// What does not change with the number of rows.
struct Weights {
  int64_t unit_elements;
  std::vector<dnnl::memory::desc> layouts;  // of 1, 2, ... units; as many as can be read as one

  // Whether a unit is [in_features / 2, kUnit, 2], without padding.
  bool in_pairs(int64_t in_features) const {
    const dnnl::memory::desc& unit = layouts[0];
    return in_features % 32 == 0 && unit.get_inner_blks() == dnnl::memory::dims{16, kUnit, 2} &&
           unit.get_inner_idxs() == dnnl::memory::dims{0, 1, 0} && unit.get_strides()[0] == 32 * kUnit;
  }
};

// Found once for each number of input features.
const Weights& weights_of(int64_t in_features, bool is_bfloat16) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, bool>, Weights> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(in_features, is_bfloat16);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  Weights weights{0, {}};
  for (int64_t units = 1; units <= kTileUnits; ++units) {
    const dnnl::memory::desc layout = joined_layout(in_features, units, is_bfloat16);
    if (layout.is_zero()) break;
    weights.layouts.push_back(layout);
  }
  weights.unit_elements = elements(weights.layouts[0], is_bfloat16);
  return known.emplace(key, std::move(weights)).first->second;
}

// Products are made once for each shape of a tile; there are at most a few hundred, as the engine has few buckets.
const TileProduct& tile_product(int64_t rows, int64_t units, int64_t in_features, bool is_bfloat16) {
  static std::shared_mutex mutex;
  static std::map<std::tuple<int64_t, int64_t, int64_t, bool>, std::unique_ptr<TileProduct>> products;
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

int64_t units_of(int64_t features) { return (features + kUnit - 1) / kUnit; }

// What the calling thread keeps for its tiles.
Scratch& scratch(int64_t which) {
  thread_local Scratch kept[kScratchpad + 1];
  return kept[which];
}

struct Product {
  const void* x;        // [rows, in_features]
  const void* weights;  // `parts` packed weights of out_features rows each, one after another
  int64_t rows, in_features, out_features, parts;
  int64_t step;  // units; a tile has a multiple of them, so that heads are whole
  bool is_bfloat16;

  int64_t element() const { return is_bfloat16 ? 2 : 4; }  // bytes of one
};

// The most units of a tile that has a multiple of `step`; 0 if it cannot have so many.
int64_t most_units(const Weights& weights, int64_t step) {
  return static_cast<int64_t>(weights.layouts.size()) / step * step;
}

// How a product is cut into tiles: near-equal numbers of rows, and so many columns that every thread gets some tiles.
//
// Tiles that follow one another share columns and differ in rows. Weights that no cache holds are so read from memory
// once for all rows. Where one holds them, rows are taken in groups that stay in a core's own cache from one column to
// the next: with 768 input features that is a tenth faster on 8192 rows.
struct Tiling {
  int64_t row_tiles, tile_rows, all_units, tile_units, column_tiles, group_tiles;

  Tiling(const Product& product, const Weights& weights, int64_t threads)
      : row_tiles((product.rows + kTileRows - 1) / kTileRows),
        tile_rows((product.rows + row_tiles - 1) / row_tiles),
        all_units(units_of(product.out_features)),
        tile_units(most_units(weights, product.step)) {
    while (tile_units > product.step &&
           row_tiles * (all_units / tile_units) < kTilesPerThread * sane_threads(threads)) {
      tile_units -= product.step;
    }
    column_tiles = (all_units + tile_units - 1) / tile_units;
    const bool cached = product.parts * all_units * weights.unit_elements * product.element() <= kCachedWeights;
    const int64_t tile_bytes = tile_rows * product.in_features * product.element();
    group_tiles = cached ? std::clamp<int64_t>(kGroupBytes / tile_bytes, 1, row_tiles) : row_tiles;
  }

  // The place of tile `index` among the tiles of rows and of columns.
  std::pair<int64_t, int64_t> place(int64_t index) const {
    const int64_t group = index / (group_tiles * column_tiles) * group_tiles, rest = index - group * column_tiles;
    const int64_t tiles = std::min(group_tiles, row_tiles - group);
    return {group + rest % tiles, rest / tiles};
  }
};

// Runs `follow(tiles, row, rows, column, columns, tile_stride)` on every tile of the products of x with each part of
// the weights. tiles[part] is the float32 product of these rows and columns, `tile_stride` elements from row to row.
template <typename Follow>
ffi::Error by_tiles(ffi::ThreadPool& pool, int64_t threads, const Product& product, const Follow& follow) {
  try {
    const Weights& weights = weights_of(product.in_features, product.is_bfloat16);
    if (most_units(weights, product.step) == 0) return invalid("a head does not fit into a tile");
    const Tiling cut(product, weights, threads);
    const int64_t element = product.element();
    const bool few = product.rows <= kFewRows && product.is_bfloat16 && weights.in_pairs(product.in_features) &&
                     instruction_set() == InstructionSet::avx512_bf16;
    std::atomic<bool> failed{false};

    parallel_for(pool, threads, cut.row_tiles * cut.column_tiles, [&](int64_t index) {
      try {
        OneThread one_thread;
        const auto [row_tile, column_tile] = cut.place(index);
        const int64_t row = row_tile * cut.tile_rows, unit = column_tile * cut.tile_units;
        const int64_t rows = std::min(cut.tile_rows, product.rows - row);
        const int64_t units = std::min(cut.tile_units, cut.all_units - unit);
        const int64_t column = unit * kUnit, columns = std::min(units * kUnit, product.out_features - column);
        const char* x = static_cast<const char*>(product.x) + row * product.in_features * element;
        const float* tiles[kMostParts] = {};
        for (int64_t part = 0; part < product.parts; ++part) {
          const int64_t first = (part * cut.all_units + unit) * weights.unit_elements;
          const char* packed = static_cast<const char*>(product.weights) + first * element;
          auto* result = scratch(part).at_least<float>(rows * units * kUnit);
          if (few) {
            avx512_bf16::multiply_few(x, rows, product.in_features, packed, units, result);
          } else {
            const TileProduct& tile = tile_product(rows, units, product.in_features, product.is_bfloat16);
            tile.run(x, packed, result, scratch(kScratchpad).at_least<char>(tile.scratchpad_bytes()));
          }
          tiles[part] = result;
        }
        follow(tiles, row, rows, column, columns, units * kUnit);
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

// Fills in a product whose x is [rows, in_features] and whose weights are one packed buffer of the same dtype.
bool read_product(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weights, int64_t out_features, int64_t parts,
                  Product& product, ffi::Error& error) {
  const auto dtype = x.element_type();
  if (x.dimensions().size() != 2 || (dtype != ffi::BF16 && dtype != ffi::F32)) {
    error = invalid("x must be a matrix of float32 or bfloat16");
    return false;
  }
  const int64_t rows = x.dimensions()[0], in_features = x.dimensions()[1];
  if (rows < 1 || in_features < 1 || out_features < 1 || out_features > kMostFeatures || in_features > kMostFeatures) {
    error = invalid("a product needs at least one row, and from 1 to 2^24 input and output features");
    return false;
  }
  if (const std::string reason = no_product(dtype == ffi::BF16); !reason.empty()) {
    error = ffi::Error(ffi::ErrorCode::kUnimplemented, "funnel_native: " + reason);
    return false;
  }
  const int64_t size = parts * packed_size(out_features, in_features, dtype == ffi::BF16);
  if (!fits("packed weights", weights, dtype, {size}, error)) return false;
  product = {x.untyped_data(), weights.untyped_data(), rows, in_features, out_features, parts, 1, dtype == ffi::BF16};
  return true;
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::RemainingArgs rest,
                  ffi::Result<ffi::AnyBuffer> out, int64_t out_features, int64_t threads) {
  ffi::Error error;
  Product product;
  if (!read_product(x, weights, out_features, 1, product, error)) return error;
  const auto out_dtype = out->element_type();
  if (out_dtype != ffi::F32 && out_dtype != x.element_type()) return invalid("the result is float32 or as x");
  if (!fits("the result", *out, out_dtype, {product.rows, out_features}, error)) return error;
  if (rest.size() > 1) return invalid("a product adds at most one matrix");
  const char* add = nullptr;
  bool add_is_bfloat16 = false;
  if (rest.size() == 1) {
    const auto added = rest.get<ffi::AnyBuffer>(0);
    if (added.has_error()) return added.error();
    if (!fits("the matrix to add", *added, x.element_type(), {product.rows, out_features}, error)) return error;
    add = static_cast<const char*>(added->untyped_data());
    add_is_bfloat16 = product.is_bfloat16;
  }
  char* to = static_cast<char*>(out->untyped_data());
  const bool out_is_bfloat16 = out_dtype == ffi::BF16;
  return by_tiles(pool, threads, product,
                  [&](const float* const* tiles, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      int64_t tile_stride) {
                    const int64_t at = row * out_features + column;
                    FUNNEL_BEST(store_product)
                    (tiles[0], tile_stride, rows, columns, add ? add + at * (add_is_bfloat16 ? 2 : 4) : nullptr,
                     add_is_bfloat16, to + at * (out_is_bfloat16 ? 2 : 4), out_is_bfloat16, out_features);
                  });
}

ffi::Error gated_linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                        ffi::Result<ffi::AnyBuffer> out, int64_t out_features, int64_t threads) {
  ffi::Error error;
  Product product;
  if (!read_product(x, weights, out_features, 2, product, error)) return error;
  if (!fits("the result", *out, x.element_type(), {product.rows, out_features}, error)) return error;
  char* to = static_cast<char*>(out->untyped_data());
  return by_tiles(pool, threads, product,
                  [&](const float* const* tiles, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      int64_t tile_stride) {
                    const int64_t at = row * out_features + column;
                    FUNNEL_BEST(store_gated)
                    (tiles[0], tiles[1], tile_stride, rows, columns, to + at * (product.is_bfloat16 ? 2 : 4),
                     product.is_bfloat16, out_features);
                  });
}

// A norm's factors, 1 + weight, for a weight [width] of float32 or bfloat16.
bool read_factor(const ffi::AnyBuffer& weight, int64_t width, std::vector<float>& factor, ffi::Error& error) {
  const auto dtype = weight.element_type() == ffi::BF16 ? ffi::BF16 : ffi::F32;
  if (!fits("a head's norm", weight, dtype, {width}, error)) return false;
  factor.resize(width);
  FUNNEL_BEST(make_factor)(weight.untyped_data(), dtype == ffi::BF16, width, factor.data());
  return true;
}

// The heads that one result holds.
struct Heads {
  int64_t first, end;         // of all heads
  std::vector<float> factor;  // of their norm; empty without one
  bool turned;
  char* out;  // [rows, end - first, head_dim]
};

// Reads what becomes of the heads: a result for each count in `turned`, with a norm for each or for none, and then one
// for the heads that are left as they are, if there are such.
bool read_heads(ffi::RemainingArgs& norms, ffi::RemainingRets& outs, ffi::Span<const int64_t> turned, int64_t plain,
                int64_t head_dim, const Product& product, std::vector<Heads>& all, ffi::Error& error) {
  const size_t results = turned.size() + (plain > 0);
  if (outs.size() != results || (norms.size() != 0 && norms.size() != turned.size())) {
    error = invalid("each group of heads needs a result, and a norm if one has it");
    return false;
  }
  const auto dtype = product.is_bfloat16 ? ffi::BF16 : ffi::F32;
  int64_t first = 0;
  for (size_t i = 0; i < results; ++i) {
    const bool turns = i < turned.size();
    const int64_t count = turns ? turned[i] : plain;
    auto out = outs.get<ffi::AnyBuffer>(i);
    if (out.has_error()) return error = out.error(), false;
    if (!fits("heads", **out, dtype, {product.rows, count * head_dim}, error)) return false;
    Heads heads{first, first + count, {}, turns, static_cast<char*>((*out)->untyped_data())};
    if (turns && norms.size() != 0) {
      const auto norm = norms.get<ffi::AnyBuffer>(i);
      if (norm.has_error()) return error = norm.error(), false;
      if (!read_factor(*norm, head_dim, heads.factor, error)) return false;
    }
    first = heads.end;
    all.push_back(std::move(heads));
  }
  return true;
}

ffi::Error project_heads(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer cos,
                         ffi::AnyBuffer sin, ffi::RemainingArgs norms, ffi::RemainingRets outs,
                         ffi::Span<const int64_t> turned, int64_t plain, int64_t head_dim, float eps,
                         int64_t threads) {
  ffi::Error error;
  Product product;
  if (head_dim < kUnit || head_dim % kUnit != 0 || head_dim > kMostFeatures) {
    return invalid("heads are products by units: their dimension must be a multiple of " + std::to_string(kUnit));
  }
  int64_t heads = 0;
  for (const int64_t count : turned) heads = count < 1 || heads < 0 || count > kMostFeatures ? -1 : heads + count;
  if (heads < 0 || plain < 0 || plain > kMostFeatures || heads + plain > kMostFeatures) {
    return invalid("numbers of heads must be positive, and few");
  }
  if (!read_product(x, weights, (heads + plain) * head_dim, 1, product, error)) return error;
  product.step = head_dim / kUnit;
  for (const auto* table : {&cos, &sin}) {
    if (!fits("cosines and sines", *table, ffi::F32, {product.rows, head_dim / 2}, error)) return error;
  }
  std::vector<Heads> groups;
  try {
    if (!read_heads(norms, outs, turned, plain, head_dim, product, groups, error)) return error;
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "funnel_native: no memory for heads");
  }
  const auto table = [&](const ffi::AnyBuffer& from, int64_t row) {
    return static_cast<const float*>(from.untyped_data()) + row * (head_dim / 2);
  };
  return by_tiles(pool, threads, product,
                  [&](const float* const* tiles, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      int64_t tile_stride) {
                    for (int64_t head = column / head_dim; head < (column + columns) / head_dim; ++head) {
                      const Heads* group = groups.data();
                      while (head >= group->end) ++group;
                      const int64_t stride = (group->end - group->first) * head_dim;
                      const int64_t at = row * stride + (head - group->first) * head_dim;
                      FUNNEL_BEST(store_heads)
                      (tiles[0] + (head * head_dim - column), tile_stride, rows, head_dim,
                       group->factor.empty() ? nullptr : group->factor.data(), eps,
                       group->turned ? table(cos, row) : nullptr, group->turned ? table(sin, row) : nullptr,
                       group->out + at * (product.is_bfloat16 ? 2 : 4), product.is_bfloat16, stride);
                    }
                  });
}

}  // namespace

int64_t packed_size(int64_t out_features, int64_t in_features, bool is_bfloat16) {
  return units_of(out_features) * weights_of(in_features, is_bfloat16).unit_elements;
}

bool prepare_product(int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, int64_t step,
                     int64_t threads) {
  const Weights& weights = weights_of(in_features, is_bfloat16);
  if (most_units(weights, step) == 0) return false;
  const Tiling cut({nullptr, nullptr, rows, in_features, out_features, 1, step, is_bfloat16}, weights, threads);
  for (const int64_t tile_rows : {cut.tile_rows, rows - (cut.row_tiles - 1) * cut.tile_rows}) {
    for (const int64_t units : {cut.tile_units, cut.all_units - (cut.column_tiles - 1) * cut.tile_units}) {
      tile_product(tile_rows, units, in_features, is_bfloat16);
    }
  }
  return true;
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
      OneThread one_thread;
      std::string name = "nothing";
      try {
        name = TileProduct(kTileRows, 1, 1024, bfloat16, any_layout(1024, 1, bfloat16)).description.impl_info_str();
      } catch (const dnnl::error&) {  // it has no product of this dtype at all
      }
      if (name.rfind("brg:", 0) != 0) {
        found[bfloat16] = std::string("oneDNN has no blocked product of ") + (bfloat16 ? "bfloat16" : "float32") +
                          " for this processor (it would run " + name + ")";
      }
    }
    return found;
  }();
  return reasons[is_bfloat16];
}

Handlers linear_handlers() {
  XLA_FFI_DEFINE_HANDLER(linear_handler, linear,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("out_features")
                             .Attr<int64_t>("threads"));
  XLA_FFI_DEFINE_HANDLER(gated_linear_handler, gated_linear,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("out_features")
                             .Attr<int64_t>("threads"));
  XLA_FFI_DEFINE_HANDLER(project_heads_handler, project_heads,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attr<ffi::Span<const int64_t>>("heads")
                             .Attr<int64_t>("plain_heads")
                             .Attr<int64_t>("head_dim")
                             .Attr<float>("eps")
                             .Attr<int64_t>("threads"));
  return {{"funnel_linear", linear_handler},
          {"funnel_gated_linear", gated_linear_handler},
          {"funnel_project_heads", project_heads_handler}};
}

}  // namespace funnel
