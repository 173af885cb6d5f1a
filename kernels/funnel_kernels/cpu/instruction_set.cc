#include "cpu/instruction_set.h"

#include <cpuid.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "oneapi/dnnl/dnnl.hpp"

namespace funnel {
namespace {

// Asks the processor itself, because clang's __builtin_cpu_supports does not know AMX.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTilesOfBfloat16 = 1u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTilesOfBfloat16) != kTilesOfBfloat16) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;  // the system keeps tiles when it switches threads
}

InstructionSet of_this_processor() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return InstructionSet::none;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return InstructionSet::avx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return InstructionSet::avx512;
  if (!__builtin_cpu_supports("avx512bf16")) return InstructionSet::avx512_vnni;
  return has_amx() ? InstructionSet::amx : InstructionSet::avx512_bf16;
}

// `none` for an unknown name.
InstructionSet named(const std::string& name) {
  const auto found = std::find(std::begin(kInstructionSets), std::end(kInstructionSets), name);
  return static_cast<InstructionSet>(found == std::end(kInstructionSets) ? 0 : found - std::begin(kInstructionSets));
}

std::string name_of(InstructionSet set) { return kInstructionSets[static_cast<size_t>(set)]; }

// The best set that FUNNEL_CPU_ISA allows, or of all if it is not set. The Python package refuses unknown names.
InstructionSet allowed() {
  const char* value = std::getenv(kLimit);
  const InstructionSet set = value ? named(value) : InstructionSet::none;
  return set == InstructionSet::none ? InstructionSet::amx : set;
}

// What oneDNN's own variable allows, as the bits of dnnl::cpu_isa.
unsigned onednn_allowed() {
  constexpr std::array<std::pair<const char*, dnnl::cpu_isa>, 11> kIsas = {{
      {"SSE41", dnnl::cpu_isa::sse41},
      {"AVX", dnnl::cpu_isa::avx},
      {"AVX2", dnnl::cpu_isa::avx2},
      {"AVX2_VNNI", dnnl::cpu_isa::avx2_vnni},
      {"AVX2_VNNI_2", dnnl::cpu_isa::avx2_vnni_2},
      {"AVX512_CORE", dnnl::cpu_isa::avx512_core},
      {"AVX512_CORE_VNNI", dnnl::cpu_isa::avx512_core_vnni},
      {"AVX512_CORE_BF16", dnnl::cpu_isa::avx512_core_bf16},
      {"AVX512_CORE_FP16", dnnl::cpu_isa::avx512_core_fp16},
      {"AVX512_CORE_AMX", dnnl::cpu_isa::avx512_core_amx},
      {"AVX512_CORE_AMX_FP16", dnnl::cpu_isa::avx512_core_amx_fp16},
  }};
  const char* value = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (value == nullptr) value = std::getenv("DNNL_MAX_CPU_ISA");  // its older name
  std::string name = value ? value : "";
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
  for (const auto& [known, isa] : kIsas) {
    if (name == known) return static_cast<unsigned>(isa);
  }
  return ~0u;
}

// With `amx` oneDNN computes products, so its own variable counts too.
InstructionSet best() {
  constexpr auto kAmx = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_amx);
  const bool onednn_has_amx = (onednn_allowed() & kAmx) == kAmx;
  return std::min({of_this_processor(), allowed(), onednn_has_amx ? InstructionSet::amx : InstructionSet::avx512_bf16});
}

const InstructionSet kProcessor = of_this_processor(), kAllowed = allowed(), kBest = best();
std::atomic<InstructionSet> current{kBest};

}  // namespace

InstructionSet instruction_set() { return current.load(std::memory_order_relaxed); }

std::string instruction_set_name() { return name_of(instruction_set()); }

std::string processor_name() { return name_of(kProcessor); }

bool limit_instruction_set(const std::string& name) {
  const InstructionSet set = named(name);
  if (set == InstructionSet::none) return false;
  current = std::min(set, kBest);
  return true;
}

void limit_onednn() {
  constexpr std::array<dnnl::cpu_isa, 5> kIsas = {dnnl::cpu_isa::isa_default, dnnl::cpu_isa::avx2,
                                                  dnnl::cpu_isa::avx512_core, dnnl::cpu_isa::avx512_core_vnni,
                                                  dnnl::cpu_isa::avx512_core_bf16};
  if (kAllowed == InstructionSet::amx) return;  // without a limit
  // The bits that both have in common are an instruction set too.
  const unsigned isa = static_cast<unsigned>(kIsas[static_cast<size_t>(kAllowed)]) & onednn_allowed();
  if (dnnl::set_max_cpu_isa(static_cast<dnnl::cpu_isa>(isa)) != dnnl::status::success) {
    throw std::runtime_error(std::string(kLimit) + " comes too late: oneDNN is in use in this process");
  }
}

}  // namespace funnel
