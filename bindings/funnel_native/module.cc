// The Python module funnel_native._handlers.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <iterator>
#include <string>

#include "cpu/caches.h"
#include "cpu/handlers.h"
#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "pool_norm/native_cpu_kernels.h"
#include "recover_norm/native_cpu_kernels.h"

namespace py = pybind11;
using namespace pybind11::literals;

static py::tuple names(const char* const* begin, const char* const* end) {
  py::list all;
  for (; begin != end; ++begin) all.append(*begin);
  return py::tuple(all);
}

static funnel::Dtype dtype_named(const std::string& name) {
  if (name == "float32") return funnel::Dtype::float32;
  if (name == "bfloat16") return funnel::Dtype::bfloat16;
  if (name == "int8") return funnel::Dtype::int8;
  throw py::value_error("weights are float32, bfloat16 or int8, not " + name);
}

PYBIND11_MODULE(_handlers, module) {
  funnel::limit_onednn();
  module.def("handlers", [] {
    py::dict all;
    for (const auto& handlers : {funnel::add_norm_handlers(), funnel::attention_handlers(), funnel::linear_handlers(),
                                 funnel::pool_norm_handlers(), funnel::post_norm_handlers(),
                                 funnel::recover_norm_handlers(), funnel::relative_attention_handlers()}) {
      for (const auto& [name, handler] : handlers) all[py::str(name)] = py::capsule(reinterpret_cast<void*>(handler));
    }
    return all;
  });
  module.attr("UNIT") = funnel::kUnit;
  module.attr("GROUP") = funnel::kGroup;
  module.attr("MOST_THREADS") = funnel::kMostThreads;
  module.attr("LIMIT") = funnel::kLimit;
  module.attr("INSTRUCTION_SETS") = names(std::begin(funnel::kInstructionSets) + 1, std::end(funnel::kInstructionSets));
  module.attr("POOLS") = names(std::begin(funnel::kPools), std::end(funnel::kPools));
  module.attr("MODES") = names(std::begin(funnel::kModes), std::end(funnel::kModes));
  module.def(
      "caches",
      [](const std::string& folder) {
        const funnel::Caches caches = funnel::read_caches(folder);
        return py::dict("core"_a = caches.core, "shared"_a = caches.shared);
      },
      py::arg("folder") = funnel::kCacheFolder);
  module.def("instruction_set", &funnel::instruction_set_name);
  module.def("processor", &funnel::processor_name);
  module.def("limit_instruction_set", &funnel::limit_instruction_set, py::arg("name"));
  module.def("multiplies_bfloat16", &funnel::multiplies_bfloat16);
  module.def("prefer_onednn", &funnel::prefer_onednn, py::arg("preferred"));
  module.def(
      "packed_size",
      [](int64_t out_features, int64_t in_features, const std::string& dtype) {
        return funnel::packed_size(out_features, in_features, dtype_named(dtype));
      },
      py::arg("out_features"), py::arg("in_features"), py::arg("dtype"));
  module.def(
      "prepare_product",
      [](int64_t rows, int64_t out_features, int64_t in_features, bool is_bfloat16, const std::string& weights,
         int64_t step, int64_t threads) {
        funnel::prepare_product(rows, out_features, in_features, is_bfloat16, dtype_named(weights), step, threads);
      },
      py::arg("rows"), py::arg("out_features"), py::arg("in_features"), py::arg("is_bfloat16"), py::arg("weights"),
      py::arg("step"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "suits_whole_rows",
      [](int64_t rows, int64_t out_features, int64_t in_features, const std::string& weights, int64_t threads) {
        return funnel::suits_whole_rows(rows, out_features, in_features, dtype_named(weights), threads);
      },
      py::arg("rows"), py::arg("out_features"), py::arg("in_features"), py::arg("weights"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  // Addresses, because NumPy's buffers do not know bfloat16; funnel_native.pack checks the arrays.
  module.def(
      "pack",
      [](uintptr_t weight, uintptr_t scales, int64_t out_features, int64_t in_features, const std::string& dtype,
         uintptr_t packed) {
        funnel::pack(reinterpret_cast<const void*>(weight), reinterpret_cast<const float*>(scales), out_features,
                     in_features, dtype_named(dtype), reinterpret_cast<void*>(packed));
      },
      py::arg("weight"), py::arg("scales"), py::arg("out_features"), py::arg("in_features"), py::arg("dtype"),
      py::arg("packed"), py::call_guard<py::gil_scoped_release>());
}
