// Products with a packed matrix: x [tokens, in] times W [out, in] transposed, in tiles.
//
// Packed form: panels of 32 outputs; within one, for each pair of inputs, the 32 outputs' two numbers
// side by side: [out / 32][in / 2][32][2]. So a panel is read once, from one end to the other.
// Every output is one chain of additions in the order of the inputs, whatever the number of tokens,
// of threads, or the tile: a token's bits do not depend on the batch.
#pragma once

#include <algorithm>

#include "ahead.h"
#include "vector.h"

namespace quickchange {

constexpr int kPanel = 32;
constexpr int kTile = 12;  // tokens computed together: 24 sums, 2 registers of W
constexpr int kMostRows = 32;  // that anything computes together
constexpr int kAheadRows = 4;  // fewer rows wait for memory all the time, and gain nothing

struct Tile {
  alignas(64) float values[kMostRows][kPanel];
  float apart[kPanel];  // of two tiles side by side, rows of the same number are not a page apart: that is slower
};

// What is brought near while a tile is computed: a panel, or null, and lines, one for each pair of inputs.
struct Ahead {
  const bf16* panel = nullptr;
  Lines lines[3];
};

// Multiplies rows with one panel. `load(k, &first, &last)` gives the numbers of a pair of inputs: of the
// first 16 outputs, and of the last.
template <int kRows, typename Load>
inline void multiply_pairs(const bf16* x, std::int64_t stride, int num_pairs, const Load& load, const Ahead& ahead,
                           float (*out)[kPanel]) {
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  const auto multiply_pair = [&](int k) __attribute__((always_inline)) {
    __m512bh first, last;
    load(k, &first, &last);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const __m512bh both = load_pair(x + m * stride + 2 * k);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], first, both);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], last, both);
    }
  };
  int k = 0;
  if constexpr (kRows >= kAheadRows) {
    for (const Lines& lines : ahead.lines) {
      const int end = std::min(k + lines.count, num_pairs);
      for (int line = 0; k < end; ++k, ++line) {
        lines.fetch(line);
        multiply_pair(k);
      }
    }
  }
  for (; k < num_pairs; ++k) multiply_pair(k);
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    _mm512_store_ps(out[m], sums[m][0]);
    _mm512_store_ps(out[m] + 16, sums[m][1]);
  }
}

template <int kRows, bool kPanelAhead>
inline void multiply_rows(const bf16* x, std::int64_t stride, const bf16* panel, int num_pairs, const Ahead& ahead,
                          float (*out)[kPanel]) {
  const auto load = [&](int k, __m512bh* first, __m512bh* last) {
    *first = load_bf16(panel + k * 2 * kPanel);
    *last = load_bf16(panel + k * 2 * kPanel + kPanel);
    if constexpr (kPanelAhead) {
      const char* next = reinterpret_cast<const char*>(ahead.panel + k * 2 * kPanel);
      _mm_prefetch(next, _MM_HINT_T1);
      _mm_prefetch(next + kLine, _MM_HINT_T1);
    }
  };
  multiply_pairs<kRows>(x, stride, num_pairs, load, ahead, out);
}

template <int kRows>
inline void multiply_ahead(const bf16* x, std::int64_t stride, const bf16* panel, int num_pairs, const Ahead& ahead,
                           float (*out)[kPanel]) {
  if (kRows >= kAheadRows && ahead.panel) return multiply_rows<kRows, true>(x, stride, panel, num_pairs, ahead, out);
  return multiply_rows<kRows, false>(x, stride, panel, num_pairs, ahead, out);
}

// Fills out [num_rows, 32] with one panel's outputs; num_inputs is even.
inline void multiply(const bf16* x, std::int64_t stride, int num_rows, const bf16* panel, int num_inputs,
                     const Ahead& ahead, float (*out)[kPanel]) {
  const int pairs = num_inputs / 2;
  switch (num_rows) {
    case 1: return multiply_ahead<1>(x, stride, panel, pairs, ahead, out);
    case 2: return multiply_ahead<2>(x, stride, panel, pairs, ahead, out);
    case 3: return multiply_ahead<3>(x, stride, panel, pairs, ahead, out);
    case 4: return multiply_ahead<4>(x, stride, panel, pairs, ahead, out);
    case 5: return multiply_ahead<5>(x, stride, panel, pairs, ahead, out);
    case 6: return multiply_ahead<6>(x, stride, panel, pairs, ahead, out);
    case 7: return multiply_ahead<7>(x, stride, panel, pairs, ahead, out);
    case 8: return multiply_ahead<8>(x, stride, panel, pairs, ahead, out);
    case 9: return multiply_ahead<9>(x, stride, panel, pairs, ahead, out);
    case 10: return multiply_ahead<10>(x, stride, panel, pairs, ahead, out);
    case 11: return multiply_ahead<11>(x, stride, panel, pairs, ahead, out);
    default: return multiply_ahead<12>(x, stride, panel, pairs, ahead, out);
  }
}

// Calls work(first, count) for the tiles of `size` tokens that `num_tokens` tokens fall into: whole ones, and the
// rest. The first, during which the next panel is fetched, then takes as long as it can.
template <typename Work>
inline void for_tiles(int num_tokens, int size, Work&& work) {
  for (int first = 0; first < num_tokens; first += size) work(first, std::min(size, num_tokens - first));
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
