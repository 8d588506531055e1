// Attention of up to sixteen queries that see the same row's KV blocks, by AMX.
//
// Queries are a few tokens' of one head, or one token's of the heads that share a KV head. Keys lie as a tile wants
// them (attention.h); two positions' values are brought side by side on the way. A query's sums run over whole groups
// of 32 positions; those that it does not see add zeros. So its bits depend on nothing but its own row, as without
// AMX, and are the same in a prompt and alone. Zero times infinity is no zero: where a sum is not a number, tokens are
// computed one by one, each from what it sees.
#pragma once

#include "amx.h"
#include "attention.h"

namespace quickchange {

constexpr int kPositions = 32;  // multiplied with values at once
constexpr int kSlab = 64;       // numbers of a head computed together: four tiles of sums

class TileAttention {
 public:
  // Queries [num_queries] of the positions that `span_of(i)` gives; query i begins at `query` + i * `query_stride`,
  // its result at `out` + i * `out_stride`.
  struct Queries {
    int token;  // any of them: they share a row of KV blocks
    int num_queries;
    const bf16* query;
    std::int64_t query_stride;
    bf16* out;
    std::int64_t out_stride;
    int first_position, step;  // of query 0, and from one to the next: 1 for tokens, 0 for heads
    std::int64_t kv_offset;    // of the KV head in a position's numbers
  };

  // How many numbers `attend` needs for so many queries that see positions up to this one.
  static std::size_t scores_size(int position, int num_queries) {
    return static_cast<std::size_t>(num_queries) * row_size(position + 1);
  }

  TileAttention(const Model& model, const Attention& attention, TileUnit& unit, float* scores)
      : model_(model), attention_(attention), unit_(unit), scores_(scores) {}

  void attend(const Layer& layer, const Queries& queries) const {
    if (attend_together(layer, queries) || queries.step == 0) return;
    for (int i = 0; i < queries.num_queries; ++i) {
      Queries one = queries;
      one.num_queries = 1;
      one.first_position += i * queries.step;
      one.query += i * queries.query_stride;
      one.out += i * queries.out_stride;
      attend_together(layer, one);
    }
  }

 private:
  using Span = Attention::Span;

  // Returns whether all sums are numbers.
  bool attend_together(const Layer& layer, const Queries& queries) const {
    Span all = span_of(layer, queries, 0, 0);
    all.end = span_of(layer, queries, queries.num_queries - 1, 0).end;
    all.first = all.start / kPositions * kPositions;
    const int stride = row_size(all.end - all.first);
    unit_.configure(queries.num_queries, queries.num_queries);
    score(layer, queries, all.first, all.end, stride);
    float factors[kTileRows];
    for (int i = 0; i < queries.num_queries; ++i) {
      float* scores = scores_ + static_cast<std::ptrdiff_t>(i) * stride;
      const Span span = span_of(layer, queries, i, all.first);
      factors[i] = 1.0f / Attention::exponentiate(scores, span, model_.attention_scale, stride - kKeys);
    }
    __mmask16 has_nan = 0;
    for (int column = 0; column < model_.head_width; column += kSlab) {
      if (column + kSlab <= model_.head_width) {
        has_nan |= gather<4>(layer, queries, all, stride, column, factors);
      } else {
        has_nan |= gather<2>(layer, queries, all, stride, column, factors);
      }
    }
    return !has_nan;
  }

  // What a query sees, with scores that begin at `first`.
  static Span span_of(const Layer& layer, const Queries& queries, int index, int first) {
    const int end = queries.first_position + queries.step * index + 1;
    const int start = layer.window && end > layer.window ? end - static_cast<int>(layer.window) : 0;
    return {queries.token, first, start, end};
  }

  // Whole groups of positions, and not a multiple of a page: rows would lie in the same few places of the cache.
  static int row_size(int num_positions) {
    return (num_positions + kPositions - 1) / kPositions * kPositions + kKeys;
  }

  // Fills scores [queries, stride], not scaled, of positions [first, end) and of what their last group of sixteen has
  // beyond, which is not used.
  void score(const Layer& layer, const Queries& queries, int first, int end, int stride) const {
    const bf16* keys = layer.keys + queries.kv_offset * kKeys;
    int position = first;
    for (; position + 4 * kKeys <= end; position += 4 * kKeys) {
      score_groups<4>(keys, queries, position, scores_ + (position - first), stride);
    }
    for (; position < end; position += kKeys) {
      score_groups<1>(keys, queries, position, scores_ + (position - first), stride);
    }
  }

  template <int kGroups>
  void score_groups(const bf16* keys, const Queries& queries, int position, float* scores, int stride) const {
    const bf16* groups[kGroups];
    for (int g = 0; g < kGroups; ++g) groups[g] = keys + attention_.place(queries.token, position + g * kKeys);
    zero_tile<0>();
    if constexpr (kGroups == 4) zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int k = 0; k < model_.head_width; k += kTileInputs) {
      load_tile<4>(queries.query + k, queries.query_stride * static_cast<std::int64_t>(sizeof(bf16)));
      load_tile<6>(groups[0] + k * kKeys, kLine);
      multiply_tiles<0, 4, 6>();
      if constexpr (kGroups == 4) {
        load_tile<7>(groups[1] + k * kKeys, kLine);
        multiply_tiles<1, 4, 7>();
        load_tile<6>(groups[2] + k * kKeys, kLine);
        multiply_tiles<2, 4, 6>();
        load_tile<7>(groups[3] + k * kKeys, kLine);
        multiply_tiles<3, 4, 7>();
      }
    }
    const std::int64_t row_bytes = static_cast<std::int64_t>(stride) * static_cast<std::int64_t>(sizeof(float));
    store_tile<0>(scores, row_bytes);
    if constexpr (kGroups == 4) {
      store_tile<1>(scores + kKeys, row_bytes);
      store_tile<2>(scores + 2 * kKeys, row_bytes);
      store_tile<3>(scores + 3 * kKeys, row_bytes);
    }
  }

  // out = factor * Σ weight · V for numbers [column, column + 16 * kTiles) of a head. What lies outside of all spans
  // is not read: it may be anything. Returns whether a sum is not a number, as a mask.
  template <int kTiles>
  __mmask16 gather(const Layer& layer, const Queries& queries, const Span& all, int stride, int column,
                   const float* factors) const {
    const bf16* values = layer.values + queries.kv_offset + column;
    const bf16* weights = reinterpret_cast<const bf16*>(scores_);
    const std::int64_t row_bytes = static_cast<std::int64_t>(stride) * static_cast<std::int64_t>(sizeof(float));
    alignas(64) bf16 pairs[kTiles][kTileRows][2 * 16];
    zero_tile<0>(), zero_tile<1>();
    if constexpr (kTiles == 4) zero_tile<2>(), zero_tile<3>();
    for (int position = all.first; position < all.end; position += kPositions) {
      pair_up<kTiles>(values, queries.token, all, position, pairs);
      load_tile<4>(weights + (position - all.first), row_bytes);
      load_tile<6>(pairs[0], kLine);
      multiply_tiles<0, 4, 6>();
      load_tile<7>(pairs[1], kLine);
      multiply_tiles<1, 4, 7>();
      if constexpr (kTiles == 4) {
        load_tile<6>(pairs[2], kLine);
        multiply_tiles<2, 4, 6>();
        load_tile<7>(pairs[3], kLine);
        multiply_tiles<3, 4, 7>();
      }
    }
    alignas(64) float sums[kTiles][kTileRows][16];
    store_tile<0>(sums[0], kLine);
    store_tile<1>(sums[1], kLine);
    if constexpr (kTiles == 4) store_tile<2>(sums[2], kLine), store_tile<3>(sums[3], kLine);
    __mmask16 has_nan = 0;
    for (int i = 0; i < queries.num_queries; ++i) {
      const __m512 factor = _mm512_set1_ps(factors[i]);
      bf16* out = queries.out + i * queries.out_stride + column;
      for (int j = 0; j < kTiles; j += 2, out += kLanes) {
        __m512 low, high;
        in_order(_mm512_mul_ps(_mm512_load_ps(sums[j][i]), factor),
                 _mm512_mul_ps(_mm512_load_ps(sums[j + 1][i]), factor), &low, &high);
        has_nan |= _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
        store_bf16(out, low);
        store_bf16(out + 16, high);
      }
    }
    return has_nan;
  }

  // Brings the values of 32 positions side by side, two by two, as a tile takes them; zeros for those outside.
  template <int kTiles>
  void pair_up(const bf16* values, int token, const Span& all, int position,
               bf16 (*pairs)[kTileRows][2 * 16]) const {
    const std::int64_t row = attention_.row_width();
    for (int half = 0; half < kPositions; half += kKeys) {
      const int start = position + half;
      const bool is_within = start < all.end && start + kKeys > all.start;
      const bf16* rows = is_within ? values + attention_.place(token, start) : nullptr;
      for (int i = 0; i < kKeys; i += 2) {
        const auto load = [&](int at, int j) __attribute__((always_inline)) {
          const bool is_seen = start + at >= all.start && start + at < all.end;
          return is_seen ? load_bits(rows + at * row + j * kLanes) : _mm512_setzero_si512();
        };
        for (int j = 0; j < kTiles / 2; ++j) {
          const __m512i even = load(i, j), odd = load(i + 1, j);
          _mm512_store_si512(pairs[2 * j][(half + i) / 2], _mm512_unpacklo_epi16(even, odd));
          _mm512_store_si512(pairs[2 * j + 1][(half + i) / 2], _mm512_unpackhi_epi16(even, odd));
        }
      }
    }
  }

  const Model& model_;
  const Attention& attention_;
  TileUnit& unit_;
  float* scores_;
};

}  // namespace quickchange
