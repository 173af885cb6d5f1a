// The term of the position is a product, too: of the queries and the offsets, one for each distance (Dai et al. 2019,
// arXiv:1901.02860, appendix B). A table holds the offsets from the largest distance to the smallest. In it, what a
// query needs for neighbouring keys lies side by side, and its place depends on the query: `place` is that of the first
// key of the run. So the product of the queries and a window of the table has rows of queries, whose numbers are read
// from the place of each, transposed, and added to the scores, which have rows of keys.
#include "relative_attention/native_cpu_kernels.h"

#include "attention/native_cpu_tile.h"
#include "cpu/row.h"

namespace funnel::FUNNEL_INSTRUCTION_SET {
namespace {

// The table is cut into panels of B. A query's window has those that the keys of a block can touch.
constexpr int64_t kPanel = kMostVectors * kLanes;
constexpr int64_t kWindowPanels = (kKeyBlock + 2 * (kPanel - 1)) / kPanel;
constexpr int64_t kWindow = kWindowPanels * kPanel;

// Where the panel begins that holds a place. Places before the table are negative.
int64_t panel_start(int64_t place) { return place - (place % kPanel + kPanel) % kPanel; }

int64_t distances(const RelativeAttention& call) { return 2 * call.reach + 1; }

template <typename Element>
int64_t panel_words(const Attention& call) {
  return round_up(words_of<Element>(call.head_dim), kLanes) * kPanel;
}

template <typename Element>
int64_t table_words(const RelativeAttention& call) {
  return round_up(distances(call), kPanel) / kPanel * panel_words<Element>(call);
}

template <typename Element>
void pack_table(const RelativeAttention& call, int64_t head, uint32_t* table) {
  const auto* offsets = static_cast<const Element*>(call.offsets) + head * call.head_dim;
  for (int64_t place = 0; place < distances(call); place += kPanel, table += panel_words<Element>(call)) {
    const int64_t last = distances(call) - 1 - place;
    transpose_rows<Element>(table, kPanel, last + 1, call.head_dim,
                            [&](int64_t i) { return offsets + (last - i) * call.heads * call.head_dim; });
  }
}

template <typename Element>
class RelativeTile final : public Tile<Element> {
  using Base = Tile<Element>;
  using Base::call_, Base::columns_, Base::kv_head_, Base::lo_, Base::offsets_, Base::run_, Base::scores_, Base::size_;

 public:
  RelativeTile(const RelativeAttention& call, int64_t head, int64_t rows, uint32_t* scratch)
      : Base(call, head, rows, scratch), relative_(call) {
    position_queries_ = scratch + Base::scratch_words(call, rows);
    biased_ = reinterpret_cast<Element*>(position_queries_ + size_.columns * size_.depth);
    windows_ = reinterpret_cast<float*>(position_queries_ + size_.columns * size_.depth + kPanel * size_.width);
    if_same_ = windows_ + kPanel * kWindow;
    if_different_ = if_same_ + size_.columns;
    types_ = reinterpret_cast<int32_t*>(if_different_ + size_.columns);
    places_ = reinterpret_cast<int64_t*>(types_ + size_.columns);
  }

  static int64_t scratch_words(const RelativeAttention& call, int64_t rows) {
    const typename Base::Size size(call, rows);
    return Base::scratch_words(call, rows) + size.columns * (size.depth + 5) + kPanel * (size.width + kWindow);
  }

 private:
  const Element* of_head(const void* matrix, int64_t row) const {
    return static_cast<const Element*>(matrix) + (row * call_.heads + kv_head_) * call_.head_dim;
  }

  uint32_t* position_queries(const Panel& panel) const { return position_queries_ + panel.column * size_.depth; }

  // Makes the queries of a panel for the terms of content and position, and computes what that of the type can be.
  // Lanes that are left over have the place and the type of the last column.
  void start(const Panel& panel) override {
    const int64_t d = call_.head_dim, columns = panel.vectors * kLanes, count = least(columns, columns_ - panel.column);
    const auto row_of = [&](int64_t i) { return offsets_[panel.column + least(i, count - 1)] / (call_.heads * d); };
    const auto is_first = [&](int64_t i) {  // the first row of a sequence has no position and no type
      return relative_.separate_first && relative_.stride * row_of(i) <= run_ + lo_[panel.column + i];
    };
    const auto with_bias = [&](int64_t i, int64_t term) {
      const auto query = columns_of(this->query(panel.column + i)), bias = columns_of(of_head(relative_.biases, term));
      return [=](int64_t j, int64_t left) { return query(j, left) + bias(j, left); };
    };
    const auto transpose_with_bias = [&](uint32_t* to, int64_t term, const auto& is_zero) {
      for (int64_t i = 0; i < count; ++i) {
        store_row(biased_ + i * d, d, with_bias(i, term));
        if (is_zero(i)) __builtin_memset(biased_ + i * d, 0, d * sizeof(Element));
      }
      transpose_rows<Element>(to, columns, count, d, [&](int64_t i) { return biased_ + i * d; });
    };
    transpose_with_bias(this->queries(panel), 0, [](int64_t) { return false; });
    transpose_with_bias(position_queries(panel), 1, is_first);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t column = panel.column + i;
      const auto query = with_bias(least(i, count - 1), 2);
      const auto product = [&](int64_t row) {
        const auto type = columns_of(of_head(relative_.same, row));
        return sum_of(d, [=](int64_t j, int64_t left) { return query(j, left) * type(j, left); });
      };
      places_[column] = relative_.reach - relative_.stride * row_of(i) + run_;
      types_[column] = relative_.query_types[row_of(i)];
      if_same_[column] = is_first(i) ? 0 : product(1);
      if_different_[column] = is_first(i) ? 0 : types_[column] == kBoth ? if_same_[column] : product(0);
    }
  }

  void add_terms(const Panel& panel, int64_t from, int64_t to) override {
    multiply_offsets(panel, from, to);
    const int32_t* key_types = relative_.key_types + run_;
    const int64_t stride = panel.vectors * kLanes;
    for (int64_t first = 0; first < stride; first += kLanes) {
      const int64_t column = panel.column + first;
      const Floats if_same = load(if_same_ + column), if_different = load(if_different_ + column);
      const Ints types = load_ints(types_ + column);
      // The first key of an interval has neither term. Without `separate_first` there is no such key.
      const Ints lo = relative_.separate_first ? load_ints(lo_ + column) : Ints{} - 1;
      const float* windows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t place = places_[column + i] + from;
        windows[i] = windows_ + (first + i) * kWindow + place - panel_start(place);
      }
      float* scores = scores_ + first;
      for (int64_t key = from; key < to; key += kLanes) {
        Words terms[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          terms[i] = load_words(reinterpret_cast<const uint32_t*>(windows[i] + key - from));
        }
        transpose(terms);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i, scores += stride) {  // scores of keys from `to` on are not read
          const int32_t at = key + i, type = key_types[least(at, to - 1)];
          const Floats by_type = type == kBoth ? if_same : types == type ? if_same : if_different;
          store(scores, load(scores) + (lo == at ? Floats{} : (Floats)terms[i] + by_type));
        }
      }
    }
  }

  // Computes the windows of a panel's queries for the keys [from, to). The term of a distance beyond the table is 0.
  void multiply_offsets(const Panel& panel, int64_t from, int64_t to) {
    const int64_t columns = panel.vectors * kLanes, end = distances(relative_), words = panel_words<Element>(relative_);
    const uint32_t* table = relative_.tables + kv_head_ * table_words<Element>(relative_);
    const int64_t* places = places_ + panel.column;
    int64_t first = end, last = 0;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t start = panel_start(places[i] + from);
      first = least(first, greatest(start, 0));
      last = greatest(last, least(places[i] + to, end));
      if (start < 0 || start + kWindow > end) __builtin_memset(windows_ + i * kWindow, 0, kWindow * sizeof(float));
    }
    for (int64_t place = first; place < last; place += kPanel) {
      for (int64_t group = 0; group < columns; group += kRows) {
        bool is_needed = false;
        for (int64_t i = group; i < group + kRows; ++i) {
          is_needed |= places[i] + from < place + kPanel && place < places[i] + to;
        }
        if (!is_needed) continue;
        const auto keep = [=](int r, const Floats(&products)[kMostVectors]) {
          const int64_t at = place - panel_start(places[group + r] + from);
          if (at < 0 || at >= kWindow) return;
          float* window = windows_ + (group + r) * kWindow + at;
          for (int v = 0; v < kMostVectors; ++v) store(window + v * kLanes, products[v]);
        };
        multiply<Element, kMostVectors>(position_queries(panel) + group, 1, columns, table + place / kPanel * words,
                                        words_of<Element>(call_.head_dim), keep);
      }
    }
  }

  const RelativeAttention& relative_;
  // In scratch memory.
  uint32_t* position_queries_;      // as queries_
  Element* biased_;                 // [columns of one panel, head_dim]
  float* windows_;                  // [columns of one panel, kWindow]
  float *if_same_, *if_different_;  // [columns]: the term of the type
  int32_t* types_;                  // [columns]: of the queries
  int64_t* places_;                 // [columns]: where the table has the offset for the first key of the run
};

template <typename Element>
void attend_relative(const RelativeAttention& call, int64_t head, int64_t row, int64_t rows, uint32_t* scratch) {
  RelativeTile<Element>(call, head, rows, scratch).run(row, rows);
}

template <typename Element>
RelativeAttentionKernels relative_kernels() {
  return {table_words<Element>, pack_table<Element>, RelativeTile<Element>::scratch_words, attend_relative<Element>};
}

}  // namespace

RelativeAttentionKernels relative_attention_kernels(bool is_bfloat16) {
  return is_bfloat16 ? relative_kernels<Bfloat16>() : relative_kernels<float>();
}

}  // namespace funnel::FUNNEL_INSTRUCTION_SET
