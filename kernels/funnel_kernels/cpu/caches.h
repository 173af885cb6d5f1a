// The sizes of the machine's caches, which tiles are made for.
#pragma once

#include <cstdint>
#include <string>

namespace funnel {

struct Caches {
  int64_t core = int64_t{1} << 20;     // bytes of a core's own cache, the one of level 2
  int64_t shared = int64_t{32} << 20;  // bytes of the cache that cores share, the one of level 3
};

constexpr const char* kCacheFolder = "/sys/devices/system/cpu/cpu0/cache";

// Reads the sizes from a folder that is laid out as Linux's. A size that it does not say has the value above, and one
// that is unusual, as virtual machines report them, is brought into the range of current processors.
Caches read_caches(const std::string& folder = kCacheFolder);

// Those of this machine, read once.
const Caches& caches();

}  // namespace funnel
