// Memory for the intermediate values of kernels. It starts on a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace funnel {

constexpr size_t kCacheLine = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// Throws std::bad_alloc if there is no memory.
inline Memory allocate(size_t bytes) {
  Memory memory(std::aligned_alloc(kCacheLine, (bytes / kCacheLine + 1) * kCacheLine));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Memory that a thread uses again for its next tile. It grows to the size of the largest.
class Scratch {
 public:
  template <typename Element>
  Element* at_least(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(Element);
    if (size_ < bytes) {
      size_ = 0;
      memory_ = nullptr;
      memory_ = allocate(bytes);
      size_ = bytes;
    }
    return static_cast<Element*>(memory_.get());
  }

 private:
  Memory memory_;
  size_t size_ = 0;
};

}  // namespace funnel
