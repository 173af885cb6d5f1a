// The XLA FFI handlers, by the names that they are registered under.
//
// A handler checks every shape and dtype before it touches memory, and returns an error that says what is wrong. What
// each computes stands beside the call in funnel_kernels/*/native_cpu.py.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace funnel {

using Handlers = std::vector<std::pair<std::string, XLA_FFI_Handler*>>;

Handlers attention_handlers();
Handlers linear_handlers();
Handlers rows_handlers();

}  // namespace funnel
