#include "instruction_set.h"

#include <algorithm>
#include <array>
#include <atomic>

namespace funnel {
namespace {

constexpr std::array<const char*, 4> kNames = {"none", "avx2", "avx512", "avx512_bf16"};

InstructionSet of_this_machine() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return InstructionSet::none;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return InstructionSet::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
}

const InstructionSet kMachine = of_this_machine();
std::atomic<InstructionSet> limit{InstructionSet::avx512_bf16};

}  // namespace

InstructionSet instruction_set() { return std::min(kMachine, limit.load(std::memory_order_relaxed)); }

bool limit_instruction_set(const std::string& name) {
  for (size_t i = 1; i < kNames.size(); ++i) {
    if (name == kNames[i]) {
      limit = static_cast<InstructionSet>(i);
      return true;
    }
  }
  return false;
}

std::string instruction_set_name() { return kNames[static_cast<size_t>(instruction_set())]; }

}  // namespace funnel
