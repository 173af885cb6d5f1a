// Which of a kernel's compiled forms runs on this machine.
//
// A kernel's source is compiled once for each instruction set, into a namespace of that name (`simd.h`). Its header
// declares all of them with FUNNEL_KERNEL; FUNNEL_BEST(name) is the one for this machine. Sources that are compiled so
// include no header with inline functions of the standard library: the linker keeps one copy of those, which may then
// be one that older machines cannot run.
#pragma once

#include <string>

namespace funnel {

enum class InstructionSet { none, avx2, avx512, avx512_bf16 };

InstructionSet instruction_set();  // the best of this machine that `limit_instruction_set` allows
// "avx2", "avx512" or "avx512_bf16"; the tests run every form that the machine can. False for any other name.
bool limit_instruction_set(const std::string& name);
std::string instruction_set_name();

}  // namespace funnel

#define FUNNEL_KERNEL(result, name, ...) \
  namespace avx2 {                       \
  result name(__VA_ARGS__);              \
  }                                      \
  namespace avx512 {                     \
  result name(__VA_ARGS__);              \
  }                                      \
  namespace avx512_bf16 {                \
  result name(__VA_ARGS__);              \
  }

#define FUNNEL_BEST(name)                                                                         \
  (::funnel::instruction_set() == ::funnel::InstructionSet::avx512_bf16 ? ::funnel::avx512_bf16::name \
   : ::funnel::instruction_set() == ::funnel::InstructionSet::avx512    ? ::funnel::avx512::name      \
                                                                        : ::funnel::avx2::name)
