// The handlers of products with a model's weights, and of the operations that follow them tile by tile.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "add_norm/native_cpu_kernels.h"
#include "cpu/factor.h"
#include "cpu/handlers.h"
#include "cpu/product.h"
#include "linear/native_cpu_kernels.h"

namespace funnel {
namespace {

constexpr int64_t kMostFeatures = int64_t{1} << 24;  // so that no size overflows

// Fills in a product whose x is [rows, in_features] and whose weights are one packed buffer.
bool read_product(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weights, int64_t out_features, int64_t parts,
                  Product& product, ffi::Error& error) {
  const auto dtype = x.element_type();
  if (x.dimensions().size() != 2 || !is_float(dtype)) {
    error = invalid("x must be a matrix of float32 or bfloat16");
    return false;
  }
  const int64_t rows = x.dimensions()[0], in_features = x.dimensions()[1];
  if (rows < 1 || in_features < 1 || out_features < 1 || out_features > kMostFeatures || in_features > kMostFeatures) {
    error = invalid("a product needs at least one row, and from 1 to 2^24 input and output features");
    return false;
  }
  const auto of_weights = weights.element_type();
  const bool is_bfloat16 = dtype == ffi::BF16;
  if (of_weights != ffi::S8 && of_weights != ffi::BF16 && (of_weights != ffi::F32 || is_bfloat16)) {
    error = invalid("packed weights must be int8 or bfloat16, or float32 if x is float32");
    return false;
  }
  const Dtype weights_dtype = of_weights == ffi::S8     ? Dtype::int8
                              : of_weights == ffi::BF16 ? Dtype::bfloat16
                                                        : Dtype::float32;
  const int64_t size = parts * packed_size(out_features, in_features, weights_dtype);
  if (!fits("packed weights", weights, of_weights, {size}, error)) return false;
  product = {x.untyped_data(), weights.untyped_data(), rows, in_features, out_features, parts, 1,
             is_bfloat16,      weights_dtype};
  return true;
}

// Reads the bias, which is the first of the operands that may be left out, if `biased` says that there is one.
bool read_bias(ffi::RemainingArgs& operands, bool biased, Product& product, ffi::Error& error) {
  if (!biased) return true;
  if (operands.size() == 0) return error = invalid("the bias is missing"), false;
  const auto bias = operands.get<ffi::AnyBuffer>(0);
  if (bias.has_error()) return error = bias.error(), false;
  if (!fits("bias", *bias, ffi::F32, {product.parts * product.out_features}, error)) return false;
  product.bias = static_cast<const float*>(bias->untyped_data());
  return true;
}

// After x and the weights come the bias, if `biased` says so, and what is added, if there is anything.
ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::RemainingArgs extras,
                  ffi::Result<ffi::AnyBuffer> out, int64_t out_features, bool biased, int64_t activation,
                  int64_t threads) {
  ffi::Error error;
  Product product;
  if (activation < -1 || activation >= kActivations) return invalid("there is no such activation");
  if (!read_product(x, weights, out_features, 1, product, error)) return error;
  const auto out_dtype = out->element_type();
  if (out_dtype != ffi::F32 && out_dtype != x.element_type()) {
    return invalid("the result must be float32 or have the dtype of x");
  }
  if (!fits("the result", *out, out_dtype, {product.rows, out_features}, error)) return error;
  if (!read_bias(extras, biased, product, error)) return error;
  if (extras.size() > biased + size_t{1}) return invalid("a product adds at most one matrix");
  const char* add = nullptr;
  if (extras.size() > biased) {
    const auto matrix = extras.get<ffi::AnyBuffer>(biased);
    if (matrix.has_error()) return matrix.error();
    if (!fits("the matrix to add", *matrix, x.element_type(), {product.rows, out_features}, error)) return error;
    add = static_cast<const char*>(matrix->untyped_data());
  }
  char* to = static_cast<char*>(out->untyped_data());
  const bool out_is_bfloat16 = out_dtype == ffi::BF16;
  return by_tiles(pool, threads, product, [&](const Tile& tile) {
    const int64_t at = tile.row * out_features + tile.column;
    FUNNEL_BEST(store_product)
    (tile.parts[0], tile.stride, tile.rows, tile.columns, static_cast<Activation>(activation),
     add ? add + at * product.element() : nullptr, product.is_bfloat16, to + at * (out_is_bfloat16 ? 2 : 4),
     out_is_bfloat16, out_features);
  });
}

// After x and the weights come the bias, if `biased` says so, and the second factor. Without the latter it is the
// product with the second part of the weights.
ffi::Error gated_linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::RemainingArgs extras,
                        ffi::Result<ffi::AnyBuffer> out, int64_t out_features, bool biased, int64_t activation,
                        int64_t threads) {
  ffi::Error error;
  Product product;
  if (activation < 0 || activation >= kActivations) return invalid("there is no such activation");
  if (extras.size() > biased + size_t{1}) return invalid("a gate has at most one second factor");
  const bool has_up = extras.size() > biased;
  if (!read_product(x, weights, out_features, has_up ? 1 : 2, product, error)) return error;
  if (!read_bias(extras, biased, product, error)) return error;
  if (!fits("the result", *out, x.element_type(), {product.rows, out_features}, error)) return error;
  const char* up = nullptr;
  if (has_up) {
    const auto matrix = extras.get<ffi::AnyBuffer>(biased);
    if (matrix.has_error()) return matrix.error();
    if (!fits("the second factor", *matrix, x.element_type(), {product.rows, out_features}, error)) return error;
    up = static_cast<const char*>(matrix->untyped_data());
  }
  char* to = static_cast<char*>(out->untyped_data());
  return by_tiles(pool, threads, product, [&](const Tile& tile) {
    const int64_t at = (tile.row * out_features + tile.column) * product.element();
    FUNNEL_BEST(store_gated)
    (tile.parts[0], tile.stride, up ? static_cast<const void*>(up + at) : tile.parts[1], up && product.is_bfloat16,
     up ? out_features : tile.stride, tile.rows, tile.columns, static_cast<Activation>(activation), to + at,
     product.is_bfloat16, out_features);
  });
}

// The sum of a product and the residual stream `add`, and its norm: `add_norm` without the update in memory.
ffi::Error linear_add_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer add,
                           ffi::AnyBuffer norm_weight, ffi::RemainingArgs extras, ffi::Result<ffi::AnyBuffer> sum,
                           ffi::Result<ffi::AnyBuffer> normed, float eps, bool biased, bool scaled, int64_t threads) {
  ffi::Error error;
  Product product;
  float scale;
  Factor factor, update_factor;
  if (add.dimensions().size() != 2) return invalid("the matrix to add must be a matrix");
  const int64_t width = add.dimensions()[1];
  if (!read_product(x, weights, width, 1, product, error)) return error;
  if (width % kUnit != 0) return invalid("the width of whole rows must be a multiple of " + std::to_string(kUnit));
  const auto dtype = x.element_type();
  for (const auto& [name, matrix] :
       {std::pair("the matrix to add", &add), {"the sum", &*sum}, {"the norm", &*normed}}) {
    if (!fits(name, *matrix, dtype, {product.rows, width}, error)) return error;
  }
  if (!read_factor("norm_weight", norm_weight, width, factor, error)) return error;
  if (!read_bias(extras, biased, product, error)) return error;
  if (!read_extras(extras, biased, scaled, width, update_factor, scale, error)) return error;
  product.step = units_of(width);
  return by_tiles(pool, threads, product, [&](const Tile& tile) {
    const int64_t at = tile.row * width * product.element();
    FUNNEL_BEST(add_norm)
    ({static_cast<const char*>(add.untyped_data()) + at, tile.parts[0], update_factor.get(), factor.get(), scale,
      static_cast<char*>(sum->untyped_data()) + at, static_cast<char*>(normed->untyped_data()) + at, width, eps,
      product.is_bfloat16, /*update_is_bfloat16=*/false},
     0, tile.rows);
  });
}

// The heads that one result holds.
struct Heads {
  int64_t first, end;  // of all heads
  Factor factor;       // of their norm; null without one
  bool turned;
  char* out;  // [rows, end - first, head_dim]
};

// Reads the results: one for each count in `turned`, and then one for the heads that are not turned, if there are any.
// `normed` says which of them have a norm; the norms are the operands from number `norms_read` on.
bool read_heads(ffi::RemainingArgs& operands, size_t norms_read, ffi::RemainingRets& outs,
                ffi::Span<const int64_t> turned, int64_t plain, ffi::Span<const int64_t> normed, int64_t head_dim,
                const Product& product, std::vector<Heads>& all, ffi::Error& error) {
  const size_t results = turned.size() + (plain > 0);
  const size_t norms_needed = std::count_if(normed.begin(), normed.end(), [](int64_t has) { return has != 0; });
  if (outs.size() != results || normed.size() != results || operands.size() != norms_read + norms_needed) {
    error = invalid("each group of heads needs a result, and a norm if `normed` says so");
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
    Heads heads{first, first + count, nullptr, turns, static_cast<char*>((*out)->untyped_data())};
    if (normed[i] != 0) {
      const auto norm = operands.get<ffi::AnyBuffer>(norms_read++);
      if (norm.has_error()) return error = norm.error(), false;
      if (!read_factor("a head's norm", *norm, head_dim, heads.factor, error)) return false;
    }
    first = heads.end;
    all.push_back(std::move(heads));
  }
  return true;
}

ffi::Error project_heads(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer cos,
                         ffi::AnyBuffer sin, ffi::RemainingArgs extras, ffi::RemainingRets outs, bool biased,
                         ffi::Span<const int64_t> normed, ffi::Span<const int64_t> turned, int64_t plain,
                         int64_t head_dim, float eps, int64_t threads) {
  ffi::Error error;
  Product product;
  if (head_dim < kUnit || head_dim % kUnit != 0 || head_dim > kMostFeatures) {
    return invalid("the dimension of a head must be a multiple of " + std::to_string(kUnit));
  }
  int64_t heads = 0;
  for (const int64_t count : turned) heads = count < 1 || heads < 0 || count > kMostFeatures ? -1 : heads + count;
  if (heads < 0 || plain < 0 || plain > kMostFeatures || heads + plain > kMostFeatures) {
    return invalid("the numbers of heads must be positive, and at most 2^24 together");
  }
  if (!read_product(x, weights, (heads + plain) * head_dim, 1, product, error)) return error;
  if (!read_bias(extras, biased, product, error)) return error;
  product.step = head_dim / kUnit;
  for (const auto* table : {&cos, &sin}) {
    if (!fits("cosines and sines", *table, ffi::F32, {product.rows, head_dim / 2}, error)) return error;
  }
  std::vector<Heads> groups;
  try {
    if (!read_heads(extras, biased, outs, turned, plain, normed, head_dim, product, groups, error)) return error;
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "funnel_native: no memory for heads");
  }
  const auto table = [&](const ffi::AnyBuffer& from, int64_t row) {
    return static_cast<const float*>(from.untyped_data()) + row * (head_dim / 2);
  };
  return by_tiles(pool, threads, product, [&](const Tile& tile) {
    for (int64_t head = tile.column / head_dim; head < (tile.column + tile.columns) / head_dim; ++head) {
      const Heads* group = groups.data();
      while (head >= group->end) ++group;
      const int64_t stride = (group->end - group->first) * head_dim;
      const int64_t at = tile.row * stride + (head - group->first) * head_dim;
      FUNNEL_BEST(store_heads)
      (tile.parts[0] + (head * head_dim - tile.column), tile.stride, tile.rows, head_dim, group->factor.get(), eps,
       group->turned ? table(cos, tile.row) : nullptr, group->turned ? table(sin, tile.row) : nullptr,
       group->out + at * product.element(), product.is_bfloat16, stride);
    }
  });
}

}  // namespace

Handlers linear_handlers() {
  XLA_FFI_DEFINE_HANDLER(linear_handler, linear,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("out_features")
                             .Attr<bool>("biased")
                             .Attr<int64_t>("activation")
                             .Attr<int64_t>("threads"));
  XLA_FFI_DEFINE_HANDLER(gated_linear_handler, gated_linear,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("out_features")
                             .Attr<bool>("biased")
                             .Attr<int64_t>("activation")
                             .Attr<int64_t>("threads"));
  XLA_FFI_DEFINE_HANDLER(linear_add_norm_handler, linear_add_norm,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .RemainingArgs()
                             .Ret<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<float>("eps")
                             .Attr<bool>("biased")
                             .Attr<bool>("scaled")
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
                             .Attr<bool>("biased")
                             .Attr<ffi::Span<const int64_t>>("normed")
                             .Attr<ffi::Span<const int64_t>>("heads")
                             .Attr<int64_t>("plain_heads")
                             .Attr<int64_t>("head_dim")
                             .Attr<float>("eps")
                             .Attr<int64_t>("threads"));
  return {{"funnel_linear", linear_handler},
          {"funnel_gated_linear", gated_linear_handler},
          {"funnel_linear_add_norm", linear_add_norm_handler},
          {"funnel_project_heads", project_heads_handler}};
}

}  // namespace funnel
