// Products with a packed matrix: x [tokens, in] times W [out, in] transposed, in tiles.
//
// Packed form: panels of 32 outputs; within one, for each pair of inputs, the 32 outputs' two numbers
// side by side: [out / 32][in / 2][32][2]. So a panel is read once, from one end to the other.
// Every output is one chain of additions in the order of the inputs, whatever the number of tokens,
// of threads, or the tile: a token's bits do not depend on the batch.
#pragma once

#include "vector.h"

namespace quickchange {

constexpr int kPanel = 32;
constexpr int kTile = 12;  // tokens computed together: 24 sums, 2 registers of W
constexpr int kAheadRows = 4;  // fewer rows wait for memory all the time, and gain nothing

struct Tile {
  alignas(64) float values[kTile][kPanel];
};

// Multiplies rows with one panel. `load(k, &first, &last)` gives the numbers of a pair of inputs: of the
// first 16 outputs, and of the last.
template <int kRows, typename Load>
inline void multiply_pairs(const bf16* x, std::int64_t stride, int num_pairs, const Load& load, Tile* tile) {
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (int k = 0; k < num_pairs; ++k) {
    __m512bh first, last;
    load(k, &first, &last);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const __m512bh both = load_pair(x + m * stride + 2 * k);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], first, both);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], last, both);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    _mm512_store_ps(tile->values[m], sums[m][0]);
    _mm512_store_ps(tile->values[m] + 16, sums[m][1]);
  }
}

template <int kRows>
inline void multiply_rows(const bf16* x, std::int64_t stride, const bf16* panel, int num_pairs, const bf16* ahead,
                          Tile* tile) {
  const auto load = [&](int k, __m512bh* first, __m512bh* last) {
    *first = load_bf16(panel + k * 2 * kPanel);
    *last = load_bf16(panel + k * 2 * kPanel + kPanel);
    if constexpr (kRows >= kAheadRows) {
      const char* next = reinterpret_cast<const char*>(ahead + k * 2 * kPanel);
      _mm_prefetch(next, _MM_HINT_T1);
      _mm_prefetch(next + 64, _MM_HINT_T1);
    }
  };
  multiply_pairs<kRows>(x, stride, num_pairs, load, tile);
}

// Fills the first `num_rows` rows of a tile with one panel's outputs; num_inputs is even. The panel
// at `ahead` is brought near meanwhile; give the panel itself where none is wanted.
inline void multiply(const bf16* x, std::int64_t stride, int num_rows, const bf16* panel, int num_inputs,
                     const bf16* ahead, Tile* tile) {
  const int pairs = num_inputs / 2;
  switch (num_rows) {
    case 1: return multiply_rows<1>(x, stride, panel, pairs, ahead, tile);
    case 2: return multiply_rows<2>(x, stride, panel, pairs, ahead, tile);
    case 3: return multiply_rows<3>(x, stride, panel, pairs, ahead, tile);
    case 4: return multiply_rows<4>(x, stride, panel, pairs, ahead, tile);
    case 5: return multiply_rows<5>(x, stride, panel, pairs, ahead, tile);
    case 6: return multiply_rows<6>(x, stride, panel, pairs, ahead, tile);
    case 7: return multiply_rows<7>(x, stride, panel, pairs, ahead, tile);
    case 8: return multiply_rows<8>(x, stride, panel, pairs, ahead, tile);
    case 9: return multiply_rows<9>(x, stride, panel, pairs, ahead, tile);
    case 10: return multiply_rows<10>(x, stride, panel, pairs, ahead, tile);
    case 11: return multiply_rows<11>(x, stride, panel, pairs, ahead, tile);
    default: return multiply_rows<12>(x, stride, panel, pairs, ahead, tile);
  }
}

// Calls work(first, count) for the tiles that `num_tokens` tokens fall into, all about as high.
template <typename Work>
inline void for_tiles(int num_tokens, Work&& work) {
  const int num_tiles = (num_tokens + kTile - 1) / kTile;
  const auto start = [&](int i) { return static_cast<int>(static_cast<std::int64_t>(num_tokens) * i / num_tiles); };
  for (int i = 0; i < num_tiles; ++i) work(start(i), start(i + 1) - start(i));
}

inline void add_bias(Tile* tile, int num_rows, const bf16* bias) {
  const __m512 first = load_floats(bias), last = load_floats(bias + 16);
  for (int m = 0; m < num_rows; ++m) {
    float* row = tile->values[m];
    _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), first));
    _mm512_store_ps(row + 16, _mm512_add_ps(_mm512_load_ps(row + 16), last));
  }
}

}  // namespace quickchange
