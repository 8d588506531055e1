// A packed matrix's panels, in bfloat16 or in int8 with a scale for each output, times tiles of tokens.
//
// An int8 panel lies as a bfloat16 one does, [out / 32][in / 2][32][2], but that within each 64 bytes
// numbers are where `byte_place` says. It is unpacked while it is multiplied by the first few tokens, and
// kept for the others. Both ways compute the same sums in the same order. Where tiles multiply, it is unpacked first.
#pragma once

#include <cstddef>

#include "amx.h"
#include "tables.h"

namespace quickchange {

constexpr int kDirectRows = 8;  // with their sums, there are registers left for unpacking

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

// Unpacks one int8 panel, and brings what lies behind it near.
inline void unpack_bytes(const std::int8_t* panel, int num_pairs, bf16* unpacked) {
  const ByteTables tables;
  const std::int8_t* next = panel + static_cast<std::int64_t>(num_pairs) * 2 * kPanel;
  for (int k = 0; k < num_pairs; ++k, unpacked += 2 * kPanel) {
    __m512i low, high;
    tables.convert(panel + k * 2 * kPanel, &low, &high);
    _mm512_storeu_si512(unpacked, low);
    _mm512_storeu_si512(unpacked + kPanel, high);
    _mm_prefetch(reinterpret_cast<const char*>(next + k * 2 * kPanel), _MM_HINT_T1);
  }
}

// Multiplies rows with one int8 panel, and keeps its numbers as bfloat16 at `unpacked` if kKeeps.
template <int kRows, bool kKeeps>
inline void multiply_bytes(const bf16* x, std::int64_t stride, const std::int8_t* panel, int num_pairs,
                           const Ahead& ahead, bf16* unpacked, float (*out)[kPanel]) {
  const ByteTables tables;
  const auto load = [&](int k, __m512bh* first, __m512bh* last) {
    __m512i low, high;
    tables.convert(panel + k * 2 * kPanel, &low, &high);
    if constexpr (kKeeps) {
      _mm512_storeu_si512(unpacked + k * 2 * kPanel, low);
      _mm512_storeu_si512(unpacked + k * 2 * kPanel + kPanel, high);
    }
    *first = (__m512bh)low;
    *last = (__m512bh)high;
  };
  multiply_pairs<kRows>(x, stride, num_pairs, load, ahead, out);
}

class Panels {
 public:
  // `unpacked` is this thread's buffer for one panel, of `unpacked_size` numbers; work on two matrices
  // at once takes two. `tiles`: this thread's, where products are computed by them, else null.
  Panels(const Linear& linear, int num_inputs, int num_tokens, bf16* unpacked, TileUnit* tiles)
      : linear_(linear), num_inputs_(num_inputs), num_tokens_(num_tokens), unpacked_(unpacked), tiles_(tiles) {}

  // How many numbers a thread's buffer has to hold.
  static std::size_t unpacked_size(const Linear& linear, int num_inputs, int num_tokens, bool in_tiles) {
    const bool is_unpacked = linear.scales && (in_tiles || num_tokens > kDirectRows);
    return is_unpacked ? static_cast<std::size_t>(num_inputs) * kPanel : 0;
  }

  // Multiplies tokens [first, first + count) of x [tokens, in], and adds the bias. A panel's tiles are
  // asked for in order, from the first on. That one, unless in int8, brings the next panel near, too.
  void multiply_tile(int panel, const bf16* x, int first, int count, Ahead ahead, Tile* tile) const {
    const bf16* rows = x + static_cast<std::int64_t>(first) * num_inputs_;
    if (linear_.scales) {
      multiply_quantised(panel, rows, first, count, ahead, tile);
    } else {
      if (first == 0) ahead.panel = numbers(panel + 1);
      multiply_numbers(rows, count, numbers(panel), ahead, tile->values);
    }
    if (linear_.bias) add_bias(tile, count, linear_.bias + panel * kPanel);
  }

 private:
  void multiply_numbers(const bf16* rows, int count, const bf16* panel, const Ahead& ahead,
                        float (*out)[kPanel]) const {
    if (tiles_) {
      tiles_->multiply(rows, num_inputs_, count, panel, num_inputs_, ahead, out);
    } else {
      multiply(rows, num_inputs_, count, panel, num_inputs_, ahead, out);
    }
  }

  // Where a panel of a matrix in bfloat16 begins; the one behind the last is what lies behind the matrix.
  const bf16* numbers(int panel) const { return static_cast<const bf16*>(linear_.weight) + offset(panel); }

  std::int64_t offset(int panel) const { return static_cast<std::int64_t>(panel) * kPanel * num_inputs_; }
  const std::int8_t* bytes(int panel) const { return static_cast<const std::int8_t*>(linear_.weight) + offset(panel); }

  void multiply_quantised(int panel, const bf16* rows, int first, int count, const Ahead& ahead, Tile* tile) const {
    int done = 0;
    if (first == 0 && tiles_) {
      unpack_bytes(bytes(panel), num_inputs_ / 2, unpacked_);
    } else if (first == 0) {
      done = std::min(count, kDirectRows);
      multiply_first(panel, rows, done, ahead, tile->values);
    }
    if (done < count) {
      multiply_numbers(rows + static_cast<std::int64_t>(done) * num_inputs_, count - done, unpacked_,
                       done ? Ahead{} : ahead, tile->values + done);
    }
    scale(tile, count, linear_.scales + panel * kPanel);
  }

  void multiply_first(int panel, const bf16* rows, int count, const Ahead& ahead, float (*out)[kPanel]) const {
    const int pairs = num_inputs_ / 2;
    switch (count) {
      case 1: return multiply_bytes<1, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
      case 2: return multiply_bytes<2, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
      case 3: return multiply_bytes<3, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
      case 4: return multiply_bytes<4, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
      case 5: return multiply_bytes<5, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
      case 6: return multiply_bytes<6, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
      case 7: return multiply_bytes<7, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
    }
    if (num_tokens_ == kDirectRows) {
      return multiply_bytes<kDirectRows, false>(rows, num_inputs_, bytes(panel), pairs, ahead, nullptr, out);
    }
    multiply_bytes<kDirectRows, true>(rows, num_inputs_, bytes(panel), pairs, ahead, unpacked_, out);
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
  const int num_inputs_, num_tokens_;
  bf16* unpacked_;
  TileUnit* tiles_;
};

}  // namespace quickchange
