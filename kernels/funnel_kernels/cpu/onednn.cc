#include "cpu/onednn.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <unordered_map>

#include "cpu/memory.h"
#include "oneapi/dnnl/dnnl.hpp"

namespace funnel::onednn {
namespace {

using dnnl::memory;

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

// [rows, features] times `units` packed units, into a dense [rows, units * kUnit] of float32, or of int32 for int8.
class Matmul {
 public:
  Matmul(int64_t rows, int64_t units, int64_t features, Dtype weights) {
    const bool is_int8 = weights == Dtype::int8;
    const auto x_type = is_int8 ? memory::data_type::u8 : memory::data_type::bf16;
    const auto weights_type = is_int8 ? memory::data_type::s8 : memory::data_type::bf16;
    const auto layout = is_int8 ? memory::format_tag::BA16a64b4a : memory::format_tag::BA16a64b2a;
    const auto out_type = is_int8 ? memory::data_type::s32 : memory::data_type::f32;
    const int64_t columns = units * kUnit;
    OneThread one_thread;
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    description_ =
        dnnl::matmul::primitive_desc(cpu(), memory::desc({rows, features}, x_type, memory::format_tag::ab),
                                     memory::desc({features, columns}, weights_type, layout),
                                     memory::desc({rows, columns}, out_type, memory::format_tag::ab), attributes);
    product_ = dnnl::matmul(description_);
  }

  void run(const void* x, const void* weights, void* out) const {
    thread_local const dnnl::stream stream(cpu());
    thread_local std::unordered_map<const Matmul*, Operands> known;
    thread_local Scratch scratchpad;
    auto found = known.find(this);
    if (found == known.end()) found = known.emplace(this, Operands(description_)).first;
    const auto bytes = static_cast<int64_t>(description_.scratchpad_desc().get_size());
    found->second.point_to(x, weights, out, scratchpad.at_least<char>(bytes));
    OneThread one_thread;
    product_.execute(stream, found->second.arguments);
  }

 private:
  // What oneDNN reads and writes, made once: for a tile of few rows this takes a tenth of the product's time.
  struct Operands {
    std::unordered_map<int, memory> arguments;

    explicit Operands(const dnnl::matmul::primitive_desc& of)
        : arguments{{DNNL_ARG_SRC, without_data(of.src_desc())},
                    {DNNL_ARG_WEIGHTS, without_data(of.weights_desc())},
                    {DNNL_ARG_DST, without_data(of.dst_desc())},
                    {DNNL_ARG_SCRATCHPAD, without_data(of.scratchpad_desc())}} {}

    void point_to(const void* x, const void* weights, void* out, void* scratchpad) {
      arguments[DNNL_ARG_SRC].set_data_handle(const_cast<void*>(x));
      arguments[DNNL_ARG_WEIGHTS].set_data_handle(const_cast<void*>(weights));
      arguments[DNNL_ARG_DST].set_data_handle(out);
      arguments[DNNL_ARG_SCRATCHPAD].set_data_handle(scratchpad);
    }

    static memory without_data(const memory::desc& description) { return memory(description, cpu(), DNNL_MEMORY_NONE); }
  };

  dnnl::matmul::primitive_desc description_;
  dnnl::matmul product_;
};

// Made once for each shape. There are at most a few hundred, since the engine has few buckets.
const Matmul& matmul(int64_t rows, int64_t units, int64_t features, Dtype weights) {
  static std::shared_mutex mutex;
  static auto& all = *new std::map<std::tuple<int64_t, int64_t, int64_t, Dtype>, std::unique_ptr<Matmul>>;
  const auto key = std::make_tuple(rows, units, features, weights);
  {
    std::shared_lock<std::shared_mutex> lock(mutex);
    const auto found = all.find(key);
    if (found != all.end()) return *found->second;
  }
  auto made = std::make_unique<Matmul>(rows, units, features, weights);
  std::unique_lock<std::shared_mutex> lock(mutex);
  return *all.emplace(key, std::move(made)).first->second;
}

int64_t features_of_group(int64_t group, int64_t in_features) { return std::min(kGroup, in_features - group * kGroup); }

}  // namespace

void multiply_bfloat16(const void* x, int64_t rows, int64_t in_features, const void* weights, int64_t units,
                       float* tile) {
  matmul(rows, units, in_features, Dtype::bfloat16).run(x, weights, tile);
}

// One group of one unit at a time: only these lie one after another. The rows of x have to as well, or else oneDNN has
// nothing but its reference, so those of a group with fewer features are copied.
void multiply_int8(const QuantizedRows& x, int64_t rows, int64_t in_features, const void* weights, int64_t units,
                   float* tile) {
  thread_local Scratch dense, sums;
  auto* group_sums = sums.at_least<int32_t>(rows * kUnit);
  for (int64_t group = 0; group < groups_of(in_features); ++group) {
    const int64_t features = features_of_group(group, in_features);
    const char* values = static_cast<const char*>(x.values) + group * rows * kGroup;
    if (features < kGroup) {
      auto* copy = dense.at_least<char>(rows * features);
      for (int64_t row = 0; row < rows; ++row) std::memcpy(copy + row * features, values + row * kGroup, features);
      values = copy;
    }
    const auto& product = matmul(rows, 1, features, Dtype::int8);
    for (int64_t unit = 0; unit < units; ++unit) {
      const char* packed = static_cast<const char*>(weights) + unit * unit_bytes(in_features, Dtype::int8);
      product.run(values, packed + group * kGroup * kUnit, group_sums);
      avx512_vnni::add_group(group_sums, x, rows, in_features, group, packed, tile + unit * kUnit, units * kUnit);
    }
  }
}

void prepare(int64_t rows, int64_t units, int64_t in_features, Dtype weights) {
  if (weights != Dtype::int8) {
    matmul(rows, units, in_features, weights);
    return;
  }
  for (const int64_t group : {int64_t{0}, groups_of(in_features) - 1}) {
    matmul(rows, 1, features_of_group(group, in_features), weights);
  }
}

}  // namespace funnel::onednn
