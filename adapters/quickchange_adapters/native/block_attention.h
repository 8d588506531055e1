// Attention of a few tokens that follow each other in a prompt, with the heads that share a KV head: twelve queries
// that read the same keys and values, where one token's heads alone would be one to four.
//
// Each query's sums are those of `Attention::attend`, in the same order: the positions that all queries see are summed
// together, and what only the later ones see, by each for itself.
#pragma once

#include "attention.h"

namespace quickchange {

class BlockAttention {
 public:
  static constexpr int kQueries = 12;

  // How many tokens a block has, for so many heads.
  static int num_tokens(int num_heads) { return kQueries / num_heads; }

  // How many numbers `attend` needs for queries that see positions up to this one.
  static std::size_t scores_size(int position) { return static_cast<std::size_t>(kQueries) * row_size(position + 1); }

  BlockAttention(const Model& model, const Attention& attention, float* scores)
      : model_(model), attention_(attention), scores_(scores) {}

  // Tokens [token, token + num_tokens(num_heads)) at `position` and behind, heads [head, head + num_heads) of one KV
  // head; all see the row from its start. qkv [tokens, qkv_width], out [tokens, out_width].
  void attend(const Layer& layer, int token, int position, int head, int num_heads, const bf16* qkv,
              std::int64_t qkv_width, bf16* out, std::int64_t out_width) const {
    const int width = model_.head_width, last = position + num_tokens(num_heads);
    const std::int64_t kv_offset = head / attention_.groups() * static_cast<std::int64_t>(width);
    const int stride = row_size(last);
    const bf16* queries[kQueries];
    Query query[kQueries];
    for (int i = 0; i < kQueries; ++i) {
      const int of_token = i / num_heads, column = (head + i % num_heads) * width;
      queries[i] = qkv + (token + of_token) * qkv_width + column;
      query[i] = {position + of_token + 1, scores_ + static_cast<std::ptrdiff_t>(i) * stride, 0,
                  out + (token + of_token) * out_width + column};
    }
    const bf16* keys = layer.keys + kv_offset * kKeys;
    int at = 0;
    for (; at + 2 * kKeys <= last; at += 2 * kKeys) score<2>(token, keys, queries, at, stride);
    for (; at < last; at += kKeys) score<1>(token, keys, queries, at, stride);
    for (Query& each : query) {
      const Attention::Span span{token, 0, 0, each.end};
      each.factor = 1.0f / Attention::exponentiate(each.weights, span, model_.attention_scale, stride - kKeys);
    }
    for (int column = 0; column < width; column += kLanes) {
      gather(token, layer.values + kv_offset + column, query, column);
    }
  }

 private:
  // One query: where what it sees ends, its scores and then weights, and where its result goes.
  struct Query {
    int end;
    float* weights;
    float factor;
    bf16* out;

    __m512bh pair(int position) const { return load_pair(reinterpret_cast<const bf16*>(weights) + position); }
  };

  // Whole groups of keys, and not a multiple of a page.
  static int row_size(int num_positions) { return (num_positions + kKeys - 1) / kKeys * kKeys + kKeys; }

  template <int kGroups>
  void score(int token, const bf16* keys, const bf16* const* queries, int position, int stride) const {
    const bf16* groups[kGroups];
    __m512 sums[kQueries][kGroups];
    for (int g = 0; g < kGroups; ++g) groups[g] = keys + attention_.place(token, position + g * kKeys);
#pragma GCC unroll 12
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) sums[i][g] = _mm512_setzero_ps();
    }
    for (int k = 0; k < model_.head_width; k += 2) {
      __m512bh pairs[kGroups];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) pairs[g] = load_bf16(groups[g] + k * kKeys);
#pragma GCC unroll 12
      for (int i = 0; i < kQueries; ++i) {
        const __m512bh q = load_pair(queries[i] + k);
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) sums[i][g] = _mm512_dpbf16_ps(sums[i][g], pairs[g], q);
      }
    }
    float* to = scores_ + position;
#pragma GCC unroll 12
    for (int i = 0; i < kQueries; ++i, to += stride) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) _mm512_storeu_ps(to + g * kKeys, sums[i][g]);
    }
  }

  // A head's numbers [column, column + 32) of all queries.
  void gather(int token, const bf16* values, const Query* queries, int column) const {
    const std::int64_t row = attention_.row_width();
    const int common = queries[0].end / 2 * 2;  // the first token sees the least
    __m512 sums[kQueries][2];
#pragma GCC unroll 12
    for (int i = 0; i < kQueries; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int position = 0; position < common;) {
      const bf16* rows = values + attention_.place(token, position);
      const int end = std::min(common, position + kKeys);
      for (; position < end; position += 2, rows += 2 * row) {
        const __m512i even = load_bits(rows), odd = load_bits(rows + row);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
        const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 12
        for (int i = 0; i < kQueries; ++i) {
          const __m512bh both = queries[i].pair(position);
          sums[i][0] = _mm512_dpbf16_ps(sums[i][0], low, both);
          sums[i][1] = _mm512_dpbf16_ps(sums[i][1], high, both);
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kQueries; ++i) {
      for (int position = common; position < queries[i].end; position += 2) {
        const bf16* rows = values + attention_.place(token, position);
        // one that is not seen has the weight zero; the other one's numbers stand in for its own
        const __m512i even = load_bits(rows), odd = position + 1 < queries[i].end ? load_bits(rows + row) : even;
        const __m512bh both = queries[i].pair(position);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], (__m512bh)_mm512_unpacklo_epi16(even, odd), both);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], (__m512bh)_mm512_unpackhi_epi16(even, odd), both);
      }
      Attention::write(sums[i], _mm512_set1_ps(queries[i].factor), queries[i].out + column);
    }
  }

  const Model& model_;
  const Attention& attention_;
  float* scores_;
};

}  // namespace quickchange
