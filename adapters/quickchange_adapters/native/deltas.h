// Adapters' deltas: hidden = weight * x·A for the rank rows of a token's own adapters, and hidden·B.
//
// A token reads the rank rows of its own adapters and no others, so a neighbour's infinity stays
// the neighbour's. Sums run in one order, whatever the batch.
#pragma once

#include <algorithm>
#include <vector>

#include "product.h"
#include "tables.h"

namespace quickchange {

// One projection group's deltas in one step: what is the same in all layers.
class GroupDeltas {
 public:
  // `terms` has one entry for each term of `blocks`: where this group's rank rows lie.
  void prepare(const Arena& arena, const RowBlock* blocks, int num_blocks, const Term* terms, int num_tokens) {
    arena_ = &arena;
    blocks_ = blocks;
    terms_ = terms;
    units_.clear();
    offsets_.assign(num_blocks ? blocks[num_blocks - 1].end_term : 0, 0);
    block_of_.assign(num_tokens, -1);
    stride_ = 0;
    a_lines_.start(kPieceShift, kMostLines);
    b_lines_.start(0, kMostLines);
    for (int b = 0; b < num_blocks; ++b) add_block(b);
    hidden_.resize(static_cast<std::size_t>(stride_) * num_tokens);
  }

  int num_units() const { return static_cast<int>(units_.size()); }

  // Computes one unit of hidden from x [tokens, in].
  void shrink(int unit, int layer, const bf16* x, std::int64_t stride) {
    const Unit& u = units_[unit];
    const Term& term = terms_[u.term];
    const bf16* rows = arena_->a_of(layer, term.first_row);
    for (int row = u.first_row; row < u.end_row; row += 4) {
      for (int token = u.first_token; token < u.end_token; token += 4) {
        shrink_tile(u, term, rows, row, token, x, stride);
      }
    }
  }

  // Lines of A that `shrink` will read: part `index` of `num_parts`, or its first `most`.
  Lines lines_of_a(int layer, int index, int num_parts, int most) const {
    return a_lines_.part(arena_->a_of(layer, 0), index, num_parts, most);
  }

  // Lines of B that `expand` will read for a panel, likewise.
  Lines lines_of_b(int layer, int panel, int index, int num_parts, int most) const {
    return b_lines_.part(arena_->b_of(layer, 0) + panel * kPanel, index, num_parts, most);
  }

  // Adds hidden·B to a tile: outputs of one panel, tokens [first, first + num_rows).
  void expand(int layer, int panel, int first, int num_rows, Tile* tile) const {
    if (units_.empty()) return;
    for (int m = 0; m < num_rows;) {
      const int block = block_of_[first + m];
      int end = m + 1;
      while (end < num_rows && end < m + kTogether && block_of_[first + end] == block) ++end;
      if (block >= 0) expand_tokens(layer, panel * kPanel, first + m, end - m, block, tile->values + m);
      m = end;
    }
  }

 private:
  // Rank rows times parts, counted flat as A holds them, for a few tokens of one block.
  struct Unit {
    int term, offset;
    int first_row, end_row;
    int first_token, end_token;
  };

  static constexpr int kUnitRows = 8, kUnitTokens = 16;
  static constexpr int kTogether = 4;  // tokens that share what is read of B
  static constexpr std::size_t kMostLines = 32768;  // 2 MiB: what is fetched too early is lost again

  void add_block(int index) {
    const RowBlock& block = blocks_[index];
    int offset = 0;
    for (int t = block.first_term; t < block.end_term; ++t) {
      offsets_[t] = offset;
      add_units(block, t, offset);
      add_lines(terms_[t]);
      offset += terms_[t].num_rows * arena_->num_parts;
    }
    stride_ = std::max(stride_, offset);
    if (offset) std::fill(block_of_.begin() + block.start, block_of_.begin() + block.end, index);
  }

  void add_units(const RowBlock& block, int term, int offset) {
    const int num_rows = terms_[term].num_rows * arena_->num_parts;
    for (int token = block.start; token < block.end; token += kUnitTokens) {
      for (int row = 0; row < num_rows; row += kUnitRows) {
        units_.push_back({term, offset, row, std::min(row + kUnitRows, num_rows), token,
                          std::min(token + kUnitTokens, block.end)});
      }
    }
  }

  bf16* hidden_of(int token) { return hidden_.data() + static_cast<std::size_t>(token) * stride_; }
  const bf16* hidden_of(int token) const { return hidden_.data() + static_cast<std::size_t>(token) * stride_; }

  void add_lines(const Term& term) {
    const std::int64_t a_row = static_cast<std::int64_t>(arena_->num_parts) * arena_->num_inputs * sizeof(bf16) / kLine;
    const std::int64_t b_row = static_cast<std::int64_t>(arena_->num_outputs) * sizeof(bf16) / kLine;
    a_lines_.add(term.first_row * a_row, term.num_rows * a_row);
    for (int r = 0; r < term.num_rows; ++r) b_lines_.add((term.first_row + r) * b_row, 1);
  }

  void shrink_tile(const Unit& u, const Term& term, const bf16* rows, int row, int token, const bf16* x,
                   std::int64_t stride) {
    const int num_tokens = std::min(4, u.end_token - token);
    const bf16* a = rows + static_cast<std::int64_t>(row) * arena_->num_inputs;
    __m512 sums[16];
    switch (num_tokens) {
      case 1: dot_rows<1>(a, x + token * stride, stride, sums); break;
      case 2: dot_rows<2>(a, x + token * stride, stride, sums); break;
      case 3: dot_rows<3>(a, x + token * stride, stride, sums); break;
      default: dot_rows<4>(a, x + token * stride, stride, sums);
    }
    alignas(64) float totals[16];
    _mm512_store_ps(totals, sum_each(sums));
    const int parts = arena_->num_parts;
    int rank = row / parts, part = row % parts;
    for (int j = 0; j < 4; ++j) {
      const bool is_bias = term.has_bias && rank == term.num_rows - 1;
      bf16* hidden = hidden_of(token) + u.offset + part * term.num_rows + rank;
      for (int i = 0; i < num_tokens; ++i, hidden += stride_) {
        *hidden = to_bf16(is_bias ? term.weight : totals[i * 4 + j] * term.weight);
      }
      if (++part == parts) part = 0, ++rank;
    }
  }

  template <int kTokens>
  void dot_rows(const bf16* a, const bf16* x, std::int64_t stride, __m512* sums) const {
    const int num_inputs = arena_->num_inputs;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    for (int k = 0; k < num_inputs; k += kLanes) {
      __m512bh w[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) w[j] = load_bf16(a + static_cast<std::int64_t>(j) * num_inputs + k);
#pragma GCC unroll 4
      for (int i = 0; i < kTokens; ++i) {
        const __m512bh value = load_bf16(x + i * stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[i * 4 + j] = _mm512_dpbf16_ps(sums[i * 4 + j], w[j], value);
      }
    }
  }

  void expand_tokens(int layer, int column, int token, int count, int block, float (*values)[kPanel]) const {
    switch (count) {
      case 1: return expand_rows<1>(layer, column, token, block, values);
      case 2: return expand_rows<2>(layer, column, token, block, values);
      case 3: return expand_rows<3>(layer, column, token, block, values);
      default: return expand_rows<4>(layer, column, token, block, values);
    }
  }

  // Two rank rows at a time: their numbers for an output lie side by side in a register, as dpbf16 takes them.
  template <int kTokens>
  void expand_rows(int layer, int column, int token, int block, float (*values)[kPanel]) const {
    const int part = arena_->part_of(column);
    const std::int64_t num_outputs = arena_->num_outputs;
    __m512 sums[kTokens][2];
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int t = blocks_[block].first_term; t < blocks_[block].end_term; ++t) {
      const Term& term = terms_[t];
      const bf16* hidden = hidden_of(token) + offsets_[t] + part * term.num_rows;
      const bf16* b = arena_->b_of(layer, term.first_row) + column;
      for (int r = 0; r < term.num_rows; r += 2, b += 2 * num_outputs) {
        const __m512i even = load_bits(b), odd = load_bits(b + num_outputs);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 4
        for (int i = 0; i < kTokens; ++i) {
          const __m512bh both = load_pair(hidden + i * static_cast<std::ptrdiff_t>(stride_) + r);
          sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, both);
          sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, both);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
      __m512 first, last;
      in_order(sums[i][0], sums[i][1], &first, &last);
      _mm512_store_ps(values[i], _mm512_add_ps(_mm512_load_ps(values[i]), first));
      _mm512_store_ps(values[i] + 16, _mm512_add_ps(_mm512_load_ps(values[i] + 16), last));
    }
  }

  const Arena* arena_ = nullptr;
  const RowBlock* blocks_ = nullptr;
  const Term* terms_ = nullptr;
  std::vector<Unit> units_;
  std::vector<int> offsets_;   // of each term, within a token's hidden numbers
  LineList a_lines_, b_lines_;
  std::vector<int> block_of_;  // of each token, or -1
  std::vector<bf16> hidden_;  // [tokens, stride]: by term, then part, then rank row, of which there is an even number
  int stride_ = 0;
};

}  // namespace quickchange
