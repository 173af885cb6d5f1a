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

PYBIND11_MODULE(_handlers, module) {
  funnel::limit_onednn();
  module.def("handlers", [] {
    py::dict all;
    for (const auto& handlers : {funnel::add_norm_handlers(), funnel::attention_handlers(), funnel::linear_handlers(),
                                 funnel::pool_norm_handlers(), funnel::recover_norm_handlers()}) {
      for (const auto& [name, handler] : handlers) all[py::str(name)] = py::capsule(reinterpret_cast<void*>(handler));
    }
    return all;
  });
  module.attr("UNIT") = funnel::kUnit;
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
  module.def("no_product", &funnel::no_product, py::arg("is_bfloat16"));
  module.def("packed_size", &funnel::packed_size, py::arg("out_features"), py::arg("in_features"),
             py::arg("is_bfloat16"));
  module.def("prepare_product", &funnel::prepare_product, py::arg("rows"), py::arg("out_features"),
             py::arg("in_features"), py::arg("is_bfloat16"), py::arg("step"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
  module.def("suits_whole_rows", &funnel::suits_whole_rows, py::arg("rows"), py::arg("out_features"),
             py::arg("in_features"), py::arg("is_bfloat16"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
  // Addresses, because NumPy's buffers do not know bfloat16; funnel_native.pack checks the arrays.
  module.def(
      "pack",
      [](uintptr_t weight, int64_t out_features, int64_t in_features, bool is_bfloat16, uintptr_t packed) {
        funnel::pack(reinterpret_cast<const void*>(weight), out_features, in_features, is_bfloat16,
                     reinterpret_cast<void*>(packed));
      },
      py::arg("weight"), py::arg("out_features"), py::arg("in_features"), py::arg("is_bfloat16"), py::arg("packed"),
      py::call_guard<py::gil_scoped_release>());
}
