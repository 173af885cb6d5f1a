// The sizes of the machine's caches, which the sizes of tiles follow.
#pragma once

#include <cstdint>
#include <string>

namespace funnel {

struct Caches {
  int64_t core = int64_t{1} << 20;     // bytes of a core's own cache, the one of level 2
  int64_t shared = int64_t{32} << 20;  // bytes of the cache that cores share, the one of level 3
};

constexpr const char* kCacheFolder = "/sys/devices/system/cpu/cpu0/cache";

// Reads the sizes from a folder like Linux's. A size that is missing has the value above. A size outside the range of
// current processors, as virtual machines may report, is brought into it.
Caches read_caches(const std::string& folder = kCacheFolder);

// Those of this machine, read once.
const Caches& caches();

}  // namespace funnel
