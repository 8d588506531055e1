// A packed matrix's panels, in bfloat16 or in int8 with a scale for each output, times tiles of tokens.
//
// An int8 panel lies as a bfloat16 one does, [out / 32][in / 2][32][2], but that within each 64 bytes
// numbers are where `byte_place` says. It is unpacked while it is multiplied where tokens are few, and
// once for all tiles where there are more. Both ways compute the same sums in the same order.
#pragma once

#include <cstddef>

#include "product.h"
#include "tables.h"

namespace quickchange {

constexpr int kDirectRows = 4;

// Where, of 64 bytes, number i lies: so that two byte-wise merges bring them into order.
constexpr int byte_place(int i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }

// The two bytes of the bfloat16 numbers 0 to 127, looked up by magnitude.
class ByteTables {
 public:
  ByteTables() {
    alignas(64) std::uint8_t low[128], high[128];
    for (int i = 0; i < 128; ++i) {
      const bf16 bits = to_bf16(static_cast<float>(i));
      low[i] = static_cast<std::uint8_t>(bits & 0xff);
      high[i] = static_cast<std::uint8_t>(bits >> 8);
    }
    for (int half = 0; half < 2; ++half) {
      low_[half] = _mm512_load_si512(low + 64 * half);
      high_[half] = _mm512_load_si512(high + 64 * half);
    }
  }

  // 64 bytes, none of them -128, as 2 x 32 bfloat16 numbers.
  void convert(const std::int8_t* from, __m512i* first, __m512i* last) const {
    const __m512i bytes = _mm512_loadu_si512(from);
    const __m512i size = _mm512_abs_epi8(bytes);
    const __m512i low = _mm512_permutex2var_epi8(low_[0], size, low_[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(high_[0], size, high_[1]);
    // magnitude | (bytes & 0x80)
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    *first = _mm512_unpacklo_epi8(low, high);
    *last = _mm512_unpackhi_epi8(low, high);
  }

 private:
  __m512i low_[2], high_[2];
};

template <int kRows>
inline void multiply_bytes(const bf16* x, std::int64_t stride, const std::int8_t* panel, int num_pairs, Tile* tile) {
  const ByteTables tables;
  const auto load = [&](int k, __m512bh* first, __m512bh* last) {
    __m512i low, high;
    tables.convert(panel + k * 2 * kPanel, &low, &high);
    *first = (__m512bh)low;
    *last = (__m512bh)high;
  };
  multiply_pairs<kRows>(x, stride, num_pairs, load, tile);
}

class Panels {
 public:
  // `unpacked` is this thread's buffer for one panel, of `unpacked_size` numbers; work on two matrices
  // at once takes two.
  Panels(const Linear& linear, int num_inputs, int num_threads, bf16* unpacked)
      : linear_(linear), num_inputs_(num_inputs), num_threads_(num_threads), unpacked_(unpacked) {}

  // How many numbers a thread's buffer has to hold.
  static std::size_t unpacked_size(const Linear& linear, int num_inputs, int num_tokens) {
    return linear.scales && num_tokens > kDirectRows ? static_cast<std::size_t>(num_inputs) * kPanel : 0;
  }

  // Multiplies tokens [first, first + count) of x [tokens, in], and adds the bias. A panel's tiles are
  // asked for in order, from the first on.
  void multiply_tile(int panel, const bf16* x, int first, int count, Tile* tile) const {
    const bf16* rows = x + static_cast<std::int64_t>(first) * num_inputs_;
    if (linear_.scales) {
      multiply_quantised(panel, rows, first, count, tile);
    } else {
      // What will be read next is fetched while the first tile is computed: panels are taken in
      // turn, so it is as far ahead as there are threads.
      const bf16* here = numbers(panel);
      multiply(rows, num_inputs_, count, here, num_inputs_, first == 0 ? numbers(panel + num_threads_) : here, tile);
    }
    if (linear_.bias) add_bias(tile, count, linear_.bias + panel * kPanel);
  }

 private:
  std::int64_t offset(int panel) const { return static_cast<std::int64_t>(panel) * kPanel * num_inputs_; }
  const bf16* numbers(int panel) const { return static_cast<const bf16*>(linear_.weight) + offset(panel); }
  const std::int8_t* bytes(int panel) const { return static_cast<const std::int8_t*>(linear_.weight) + offset(panel); }

  void multiply_quantised(int panel, const bf16* rows, int first, int count, Tile* tile) const {
    const int pairs = num_inputs_ / 2;
    // Tiles of so few rows are alone: more tokens are cut into higher ones.
    if (count == 1) {
      multiply_bytes<1>(rows, num_inputs_, bytes(panel), pairs, tile);
    } else if (count == 2) {
      multiply_bytes<2>(rows, num_inputs_, bytes(panel), pairs, tile);
    } else if (count <= kDirectRows) {
      count == 3 ? multiply_bytes<3>(rows, num_inputs_, bytes(panel), pairs, tile)
                 : multiply_bytes<4>(rows, num_inputs_, bytes(panel), pairs, tile);
    } else {
      if (first == 0) unpack(panel);
      multiply(rows, num_inputs_, count, unpacked_, num_inputs_, unpacked_, tile);
    }
    scale(tile, count, linear_.scales + panel * kPanel);
  }

  void unpack(int panel) const {
    const std::size_t size = static_cast<std::size_t>(num_inputs_) * kPanel;
    const std::int8_t* from = bytes(panel);
    const ByteTables tables;
    for (std::size_t i = 0; i < size; i += 2 * kLanes) {
      __m512i first, last;
      tables.convert(from + i, &first, &last);
      _mm512_storeu_si512(unpacked_ + i, first);
      _mm512_storeu_si512(unpacked_ + i + kLanes, last);
    }
  }

  static void scale(Tile* tile, int num_rows, const float* scales) {
    const __m512 first = _mm512_loadu_ps(scales), last = _mm512_loadu_ps(scales + 16);
    for (int m = 0; m < num_rows; ++m) {
      float* row = tile->values[m];
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), first));
      _mm512_store_ps(row + 16, _mm512_mul_ps(_mm512_load_ps(row + 16), last));
    }
  }

  const Linear& linear_;
  const int num_inputs_, num_threads_;
  bf16* unpacked_;
};

}  // namespace quickchange
