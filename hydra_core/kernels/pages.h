// Memory on large pages: what a step reads from end to end comes a third faster where a page is 2 MiB than where it is 4 KiB.
#pragma once

#include <ATen/ATen.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace pages {

constexpr size_t PAGE = 2 << 20, CHUNK = 32 << 20, LINE = 64;

// Bytes that many tensors share, each a part; freed with the last of them.
struct Chunk {
  char* start;
  size_t size, used = 0;

  explicit Chunk(size_t bytes) : size((bytes + PAGE - 1) / PAGE * PAGE) {
    start = static_cast<char*>(std::aligned_alloc(PAGE, size));
    TORCH_CHECK(start != nullptr, "no memory for ", size, " bytes");
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);  // a wish: where it is not granted, the memory is as any other
#endif
  }
  ~Chunk() { std::free(start); }
  Chunk(const Chunk&) = delete;
};

// Bytes of a new part, and what keeps them. Small parts share chunks, a large one has its own.
inline std::pair<char*, std::shared_ptr<Chunk>> take(size_t bytes) {
  static std::mutex turn;
  static std::shared_ptr<Chunk> current;
  const size_t wanted = (bytes + LINE - 1) / LINE * LINE;
  if (wanted > CHUNK / 2) {
    auto own = std::make_shared<Chunk>(wanted);
    return {own->start, own};
  }
  const std::lock_guard<std::mutex> lock(turn);
  if (!current || current->size - current->used < wanted) current = std::make_shared<Chunk>(CHUNK);
  char* at = current->start + current->used;
  current->used += wanted;
  return {at, current};
}

// An uninitialised tensor there.
inline at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  auto [at, chunk] = take(std::max<int64_t>(count, 1) * c10::elementSize(dtype));
  return at::from_blob(at, sizes, [kept = chunk](void*) mutable { kept.reset(); }, at::TensorOptions().dtype(dtype));
}

// A copy of `given` there.
inline at::Tensor copy(const at::Tensor& given) {
  return empty(given.sizes(), given.scalar_type()).copy_(given);
}

}  // namespace pages
