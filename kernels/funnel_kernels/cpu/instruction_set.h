// Chooses which of a kernel's compiled forms runs on this machine.
//
// A kernel's source (*_kernels.cc) is compiled once for each instruction set, into a namespace of that name (simd.h).
// Its header declares all of them with FUNNEL_KERNEL; FUNNEL_FORM(name, set) is the one for an instruction set, and
// FUNNEL_BEST(name) the one for this machine. Such sources must not use inline functions of the standard library: the
// linker keeps one copy of each, which may be one that older machines cannot run.
#pragma once

#include <string>

namespace funnel {

// Each contains those before it. Only products of int8 have a form for `avx512_vnni`. With `amx` our own kernels are
// those of avx512_bf16, and oneDNN computes the products of bfloat16 and int8.
enum class InstructionSet { none, avx2, avx512, avx512_vnni, avx512_bf16, amx };
constexpr const char* kInstructionSets[] = {"none", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
constexpr const char* kLimit = "FUNNEL_CPU_ISA";  // the variable that limits the kernels, and oneDNN, to one of them

InstructionSet instruction_set();  // the one that kernels run with
std::string instruction_set_name();
std::string processor_name();  // the best of this processor, whatever limits it

// Kernels run with `name` ("avx2", ..., "amx") from now on, or with the best set below it that this processor has and
// FUNNEL_CPU_ISA allows: the tests run every form. False for any other name.
bool limit_instruction_set(const std::string& name);

// Limits oneDNN to FUNNEL_CPU_ISA. Throws if oneDNN was used before.
void limit_onednn();

}  // namespace funnel

#define FUNNEL_KERNEL(result, name, ...) \
  namespace avx2 {                       \
  result name(__VA_ARGS__);              \
  }                                      \
  namespace avx512 {                     \
  result name(__VA_ARGS__);              \
  }                                      \
  namespace avx512_vnni {                \
  result name(__VA_ARGS__);              \
  }                                      \
  namespace avx512_bf16 {                \
  result name(__VA_ARGS__);              \
  }

#define FUNNEL_FORM(name, set)                                                  \
  ((set) >= ::funnel::InstructionSet::avx512_bf16 ? ::funnel::avx512_bf16::name \
   : (set) >= ::funnel::InstructionSet::avx512    ? ::funnel::avx512::name      \
                                                  : ::funnel::avx2::name)

#define FUNNEL_BEST(name) FUNNEL_FORM(name, ::funnel::instruction_set())
