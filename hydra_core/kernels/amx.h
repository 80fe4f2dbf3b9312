// AMX tiles: whether they may be used, and their configuration for a thread. A tile holds sixteen lines of 64 bytes; one
// instruction multiplies sixteen rows by sixteen outputs over thirty-two inputs.
#pragma once

#include <algorithm>

#include "simd.h"

#ifdef HYDRA_SIMD
#ifdef HYDRA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace simd {

constexpr int64_t TILE_INPUTS = 32;   // bfloat16 values in a line of a tile
constexpr int64_t MAX_ROWS_AMX = 32;  // rows that are multiplied together: two tiles of rows by two tiles of outputs

// Tile instructions do not tell the compiler what they read: this makes it store all values to memory before them.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// Whether this process may use tiles. Linux grants them on request, since their state is large.
inline bool amx_allowed() {
#ifdef HYDRA_AMX
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
#else
  return false;
#endif
}

// Whether products over `in` inputs use tiles.
inline bool uses_amx(int64_t in) { return in % TILE_INPUTS == 0 && amx_allowed(); }

// The shapes of this thread's tiles, set for `rows` rows; the destructor releases the tiles.
struct TileConfig {
  int64_t rows = 0;
#ifdef HYDRA_AMX
  ~TileConfig() {
    if (rows) _tile_release();
  }

  // Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 outputs.
  void set(int64_t wanted) {
    if (rows == wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t lines[16] = {};
    } shapes;
    const int64_t low = std::min<int64_t>(wanted, 16), high = wanted - low;
    const auto shape = [&](int tile, int64_t lines) { shapes.bytes[tile] = lines ? 64 : 0, shapes.lines[tile] = lines; };
    shape(0, low), shape(1, low), shape(4, low), shape(2, high), shape(3, high), shape(5, high), shape(6, 16), shape(7, 16);
    compiler_barrier();
    _tile_loadconfig(&shapes);
    rows = wanted;
  }
#endif
};

}  // namespace simd
#endif
