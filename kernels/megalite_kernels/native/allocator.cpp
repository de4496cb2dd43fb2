// PyTorch's allocator of CPU memory, on malloc instead of posix_memalign.
//
// glibc's posix_memalign asks for the size, the alignment and room for two chunks, and gives back what it does not need.
// So the hole that a freed block leaves is always a little smaller than what the next block of that size asks for: it is
// never filled in whole, and the heap of a training step grows by tens of percent. Here every block asks for the size and
// the alignment, keeps both, and fits where another one of its size has been.

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr std::size_t ALIGNMENT = 64;  // as PyTorch's own

// malloc aligns to 16, so at least as many bytes lie before `data`: the last of them say where the block begins.
void release(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  std::free(static_cast<void**>(data)[-1]);
}

struct WholeBlocks final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    void* data = nullptr;
    if (bytes > 0) {
      void* block = bytes <= SIZE_MAX - ALIGNMENT ? std::malloc(bytes + ALIGNMENT) : nullptr;
      if (block == nullptr) c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      TORCH_CHECK(block != nullptr, "not enough memory: you tried to allocate ", bytes, " bytes.");
      auto after = reinterpret_cast<std::uintptr_t>(block) + ALIGNMENT;
      data = reinterpret_cast<void*>(after - after % ALIGNMENT);
      static_cast<void**>(data)[-1] = block;
      c10::profiledCPUMemoryReporter().New(data, bytes);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// For all memory from here on; what was allocated before is freed as it was. PyTorch keeps the allocator for ever.
extern "C" void reuse_whole_blocks() { c10::SetCPUAllocator(new WholeBlocks, 1); }
