// Memory on huge pages: a step reads its matrices a third faster from pages of 2 MiB than from pages of 4 KiB.
#pragma once

#include <ATen/ATen.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace huge_pages {

constexpr size_t PAGE = 2 << 20, CHUNK = 32 << 20, LINE = 64;

// Memory that several tensors share; it is freed with the last of them.
struct Chunk {
  char* start;
  size_t size, used = 0;

  explicit Chunk(size_t bytes) : size((bytes + PAGE - 1) / PAGE * PAGE) {
    start = static_cast<char*>(std::aligned_alloc(PAGE, size));
    TORCH_CHECK(start != nullptr, "no memory for ", size, " bytes");
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);  // a request: if it is refused, this is ordinary memory
#endif
  }
  ~Chunk() { std::free(start); }
  Chunk(const Chunk&) = delete;
};

// Allocate `bytes`: their address, and the chunk that keeps them. Small parts share chunks, a large one has its own.
inline std::pair<char*, std::shared_ptr<Chunk>> take(size_t bytes) {
  static std::mutex mutex;
  static std::shared_ptr<Chunk> current;
  const size_t wanted = (bytes + LINE - 1) / LINE * LINE;
  if (wanted > CHUNK / 2) {
    auto own = std::make_shared<Chunk>(wanted);
    return {own->start, own};
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (!current || current->size - current->used < wanted) current = std::make_shared<Chunk>(CHUNK);
  char* at = current->start + current->used;
  current->used += wanted;
  return {at, current};
}

// An uninitialised tensor on huge pages.
inline at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  auto [at, chunk] = take(std::max<int64_t>(count, 1) * c10::elementSize(dtype));
  return at::from_blob(at, sizes, [kept = chunk](void*) mutable { kept.reset(); }, at::TensorOptions().dtype(dtype));
}

// A copy of `given` on huge pages.
inline at::Tensor copy(const at::Tensor& given) {
  return empty(given.sizes(), given.scalar_type()).copy_(given);
}

}  // namespace huge_pages
