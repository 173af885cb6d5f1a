// The XLA FFI handlers, by the names that they are registered under; an op's are in native_cpu.cc of its folder.
//
// A handler checks every shape and dtype before it touches memory, and returns an error that says what is wrong.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace funnel {

using Handlers = std::vector<std::pair<std::string, XLA_FFI_Handler*>>;

Handlers add_norm_handlers();
Handlers attention_handlers();
Handlers linear_handlers();
Handlers pool_norm_handlers();
Handlers post_norm_handlers();
Handlers recover_norm_handlers();
Handlers relative_attention_handlers();

}  // namespace funnel
