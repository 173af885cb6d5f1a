#include "cpu/caches.h"

#include <algorithm>
#include <fstream>

namespace funnel {
namespace {

constexpr int64_t kKilobyte = 1024, kMegabyte = 1024 * kKilobyte;
constexpr int kMostCaches = 10;  // of one core

template <typename Value>
Value read(const std::string& file) {
  Value value{};
  std::ifstream(file) >> value;
  return value;
}

// Bytes, from e.g. "1024K"; 0 for anything else.
int64_t read_size(const std::string& file) {
  std::ifstream stream(file);
  int64_t kilobytes = 0;
  char unit = 0;
  if (!(stream >> kilobytes >> unit) || unit != 'K' || kilobytes < 0) return 0;
  return std::min(kilobytes, kMegabyte) * kKilobyte;  // without overflow
}

}  // namespace

// sysconf would need no files, but on virtual machines it may report a cache of level 3 that is ten times too large.
Caches read_caches(const std::string& folder) {
  Caches caches;
  for (int index = 0; index < kMostCaches; ++index) {
    const std::string cache = folder + "/index" + std::to_string(index);
    const int level = read<int>(cache + "/level");
    const int64_t size = read_size(cache + "/size");
    if (size == 0 || read<std::string>(cache + "/type") == "Instruction") continue;
    if (level == 2) caches.core = std::clamp(size, 512 * kKilobyte, 2 * kMegabyte);
    if (level == 3) caches.shared = std::clamp(size, 4 * kMegabyte, 64 * kMegabyte);
  }
  return caches;
}

const Caches& caches() {
  static const Caches of_this_machine = read_caches();
  return of_this_machine;
}

}  // namespace funnel
