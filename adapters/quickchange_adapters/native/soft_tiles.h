// The tile instructions in plain C++, bit for bit, for tests on machines that have none.
//
// Included by amx.h when QUICKCHANGE_SOFT_TILES is defined; no server is built so.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace quickchange {

struct SoftTile {
  alignas(64) unsigned char rows[16][64];
  int num_rows, row_bytes;
};

inline thread_local SoftTile soft_tiles[8];

template <typename Config>
inline void configure_tiles(const Config& config) {
  for (int i = 0; i < 8; ++i) {
    std::memset(soft_tiles[i].rows, 0, sizeof soft_tiles[i].rows);
    soft_tiles[i].num_rows = config.rows[i];
    soft_tiles[i].row_bytes = config.row_bytes[i];
  }
}

inline void release_tiles() {
  for (SoftTile& tile : soft_tiles) tile.num_rows = tile.row_bytes = 0;
}

inline bool may_use_tiles() { return true; }

// Ends the process where the processor would take the instruction for none.
inline void check(bool is_possible) {
  if (!is_possible) std::abort();
}

template <int kTo>
inline void zero_tile() {
  check(soft_tiles[kTo].num_rows > 0);
  std::memset(soft_tiles[kTo].rows, 0, sizeof soft_tiles[kTo].rows);
}

template <int kTo>
inline void load_tile(const void* from, std::int64_t stride) {
  SoftTile& tile = soft_tiles[kTo];
  check(tile.num_rows > 0);
  for (int row = 0; row < tile.num_rows; ++row) {
    std::memcpy(tile.rows[row], static_cast<const char*>(from) + row * stride, tile.row_bytes);
  }
}

template <int kFrom>
inline void store_tile(void* to, std::int64_t stride) {
  const SoftTile& tile = soft_tiles[kFrom];
  check(tile.num_rows > 0);
  for (int row = 0; row < tile.num_rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile.rows[row], tile.row_bytes);
  }
}

// The instruction takes numbers too small for their full precision as zero, and gives none.
inline float without_subnormals(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline float number_of(const SoftTile& tile, int row, int column) {
  std::uint16_t bits;
  std::memcpy(&bits, tile.rows[row] + 2 * column, sizeof bits);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return without_subnormals(value);
}

template <int kSums, int kX, int kW>
inline void multiply_tiles() {
  SoftTile &sums = soft_tiles[kSums], &x = soft_tiles[kX], &w = soft_tiles[kW];
  check(sums.num_rows > 0 && x.num_rows == sums.num_rows);
  check(w.num_rows * 4 == x.row_bytes && w.row_bytes == sums.row_bytes);
  for (int m = 0; m < sums.num_rows; ++m) {
    float halves[16][2] = {};
    for (int k = 0; k < x.row_bytes / 4; ++k) {
      for (int n = 0; n < sums.row_bytes / 4; ++n) {
        for (int odd = 0; odd < 2; ++odd) {
          const float product_and_sum =
              std::fma(number_of(x, m, 2 * k + odd), number_of(w, k, 2 * n + odd), halves[n][odd]);
          halves[n][odd] = without_subnormals(product_and_sum);
        }
      }
    }
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      float sum;
      std::memcpy(&sum, sums.rows[m] + 4 * n, sizeof sum);
      sum = without_subnormals(sum + without_subnormals(halves[n][0] + halves[n][1]));
      std::memcpy(sums.rows[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace quickchange
