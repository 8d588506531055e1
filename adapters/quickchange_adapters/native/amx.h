// Products by AMX: eight registers of tiles, 16 rows of 64 bytes each, and an instruction that multiplies two.
//
// A panel is what the instruction wants of W: 16 pairs of inputs, and 16 outputs' two numbers in each. One
// instruction sums the even and the odd inputs of 32 for themselves, adds both, and adds that to what was there. So
// here, too, every output is one chain in the order of the inputs, whatever the number of tokens, of threads, or the
// tile; but it is another chain than the one without AMX: a server takes the one or the other for all it computes.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "product.h"

#ifdef QUICKCHANGE_SOFT_TILES
#include "soft_tiles.h"
#endif

namespace quickchange {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 32;
constexpr int kRowsInTiles = 2 * kTileRows;  // tokens computed together: four sums, two tiles of x, two of W
static_assert(kRowsInTiles <= kMostRows);

// What a thread's tiles are: palette 1, and the rows and bytes a row of each.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#ifdef QUICKCHANGE_WITHOUT_AMX  // an assembler that does not know the instructions

inline void configure_tiles(const TileConfig&) {}
inline void release_tiles() {}
template <int kTo>
inline void zero_tile() {}
template <int kTo>
inline void load_tile(const void*, std::int64_t) {}
template <int kFrom>
inline void store_tile(void*, std::int64_t) {}
template <int kSums, int kX, int kW>
inline void multiply_tiles() {}
inline bool may_use_tiles() { return false; }

#elif !defined(QUICKCHANGE_SOFT_TILES)

// No compiler uses these registers on its own, so none has to be told which of them are in use.
inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

inline void release_tiles() { asm volatile("tilerelease"); }

template <int kTo>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTo));
}

// `stride`: bytes from one row to the next.
template <int kTo>
inline void load_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTo) : "memory");
}

template <int kFrom>
inline void store_tile(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kFrom) : "memory");
}

template <int kSums, int kX, int kW>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
}

// Asks the system for the right to use the tiles, for all threads of this process.
inline bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

// Whether steps and products that begin from now on are computed by tiles.
inline std::atomic<bool> uses_tiles{false};

// One thread's tiles: 0 to 3 are sums, 4 and 5 what has a row for each token, 6 and 7 what they are multiplied with.
// Those of fewer tokens have fewer rows, so that nothing is read behind the last one.
class TileUnit {
 public:
  TileUnit() = default;
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
  ~TileUnit() {
    if (first_rows_) release_tiles();
  }

  // Fills out [num_rows, 32] with one panel's outputs; num_inputs is a multiple of 32.
  void multiply(const bf16* x, std::int64_t stride, int num_rows, const bf16* panel, int num_inputs,
                const Ahead& ahead, float (*out)[kPanel]) {
    const int first = std::min(num_rows, kTileRows);
    configure(first, num_rows - first);
    num_rows > kTileRows ? multiply_rows<true>(x, stride, panel, num_inputs, ahead, out)
                         : multiply_rows<false>(x, stride, panel, num_inputs, ahead, out);
  }

  // Gives tiles 0, 1 and 4 so many rows, and 2, 3 and 5 so many, maybe none.
  void configure(int first, int last) {
    if (first == first_rows_ && last == last_rows_) return;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_of_last = tile == 2 || tile == 3 || tile == 5;
      const int rows = tile >= 6 ? kTileRows : is_of_last ? last : first;
      config.rows[tile] = static_cast<std::uint8_t>(rows);
      config.row_bytes[tile] = rows ? kLine : 0;
    }
    configure_tiles(config);
    first_rows_ = first, last_rows_ = last;
  }

 private:
  template <bool kTwo>
  static void multiply_rows(const bf16* x, std::int64_t stride, const bf16* panel, int num_inputs, const Ahead& ahead,
                            float (*out)[kPanel]) {
    constexpr std::int64_t kPairBytes = 2 * kPanel * sizeof(bf16), kRowBytes = kPanel * sizeof(float);
    const std::int64_t x_bytes = stride * static_cast<std::int64_t>(sizeof(bf16));
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (kTwo) zero_tile<2>(), zero_tile<3>();
    LinesInTurn lines(ahead.lines);
    for (int k = 0; k < num_inputs; k += kTileInputs) {
      const bf16* w = panel + static_cast<std::int64_t>(k) * kPanel;
      load_tile<6>(w, kPairBytes);
      load_tile<4>(x + k, x_bytes);
      multiply_tiles<0, 4, 6>();
      load_tile<7>(w + kPanel, kPairBytes);
      multiply_tiles<1, 4, 7>();
      if constexpr (kTwo) {
        load_tile<5>(x + kTileRows * stride + k, x_bytes);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
      }
      if (ahead.panel) fetch_inputs(ahead.panel + static_cast<std::int64_t>(k) * kPanel);
      lines.fetch(kTileInputs / 2);
    }
    store_tile<0>(out[0], kRowBytes);
    store_tile<1>(out[0] + 16, kRowBytes);
    if constexpr (kTwo) {
      store_tile<2>(out[kTileRows], kRowBytes);
      store_tile<3>(out[kTileRows] + 16, kRowBytes);
    }
  }

  // Brings near what one turn of the loop reads of a panel.
  static void fetch_inputs(const bf16* panel) {
    const char* next = reinterpret_cast<const char*>(panel);
#pragma GCC unroll 4
    for (int line = 0; line < kTileInputs; ++line) _mm_prefetch(next + line * kLine, _MM_HINT_T1);
  }

  int first_rows_ = 0, last_rows_ = 0;  // that the tiles are configured for; 0: not at all
};

}  // namespace quickchange
