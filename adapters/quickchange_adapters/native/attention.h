// Attention of one token over its KV blocks, read in place. Sums run in one order, whatever the batch.
//
// Keys lie so that sixteen of them are scored side by side, a lane each: within a block, by groups of
// sixteen positions: [block][block size / 16][KV heads][head width / 2][16][2]. Values lie as they come:
// [block][block size][KV heads][head width].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "tables.h"

namespace quickchange {

// Rotates one head [width] by its position, in place. Source: Su et al. 2021 (arXiv 2104.09864), in
// the form that pairs the two halves of a head.
inline void rotate(bf16* head, int width, const bf16* cosines, const bf16* sines) {
  const int half = width / 2;
  for (int i = 0; i < half; i += 16) {
    const __m512 c = load_floats(cosines + i), s = load_floats(sines + i);
    const __m512 x = load_floats(head + i), y = load_floats(head + half + i);
    store_bf16(head + i, _mm512_fmsub_ps(x, c, _mm512_mul_ps(y, s)));
    store_bf16(head + half + i, _mm512_fmadd_ps(y, c, _mm512_mul_ps(x, s)));
  }
}

// Divides by the root of the mean square, rounds, and multiplies by the weight, as transformers does.
// Source: Zhang and Sennrich 2019 (arXiv 1910.07467). `out` may be `x`.
inline void normalise(const bf16* x, int width, const bf16* weight, float epsilon, bf16* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    const __m512 v = load_floats(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int i = 0; i < width; i += 16) {
    const __m512 v = round_to_bf16(_mm512_mul_ps(load_floats(x + i), factor));
    store_bf16(out + i, _mm512_mul_ps(v, load_floats(weight + i)));
  }
}

constexpr int kKeys = 16;     // scored together; KV blocks hold a multiple of them
constexpr int kMaxHeads = 4;  // query heads of one KV head that read its values together

class Attention {
 public:
  Attention(const Model& model, const Step& step) : model_(model), step_(step) {}

  // How many scores a head needs that sees positions up to this one: whole groups of keys.
  static int scores_size(int position) { return (position / kKeys + 1) * kKeys; }

  // Norms and rotates a token's queries and keys in qkv [tokens, out], and stores its K and V.
  void store(const Layer& layer, int token, bf16* qkv) const {
    const int width = model_.head_width;
    const int position = step_.positions[token];
    const bf16* cosines = model_.cosines + static_cast<std::int64_t>(position) * (width / 2);
    const bf16* sines = model_.sines + static_cast<std::int64_t>(position) * (width / 2);
    for (int head = 0; head < model_.num_heads + model_.num_kv_heads; ++head) {
      const bf16* norm = head < model_.num_heads ? layer.query_norm : layer.key_norm;
      if (norm) normalise(qkv + head * width, width, norm, model_.epsilon, qkv + head * width);
      rotate(qkv + head * width, width, cosines, sines);
    }
    const bf16* key = qkv + model_.num_heads * width;
    bf16* lane = layer.keys + place(token, position / kKeys * kKeys) + position % kKeys * 2;
    for (std::int64_t k = 0; k < row_width(); k += 2) std::memcpy(lane + k * kKeys, key + k, 2 * sizeof(bf16));
    std::memcpy(layer.values + place(token, position), key + row_width(), sizeof(bf16) * row_width());
  }

  // Fills out [heads, head width] with the attention of one token's heads, all of one KV head;
  // query [heads, head width]. `scores` holds scores_size of the token's position, for each head.
  void attend(const Layer& layer, int token, int head, int num_heads, const bf16* query, float* scores,
              bf16* out) const {
    const int kv_head = head / groups();
    const std::int64_t offset = static_cast<std::int64_t>(kv_head) * model_.head_width;
    const int end = step_.positions[token] + 1;
    const int start = layer.window && end > layer.window ? end - static_cast<int>(layer.window) : 0;
    const Span span{token, start / kKeys * kKeys, start, end};
    const int stride = scores_size(end - 1 - span.first);
    const Heads heads{layer.keys + offset * kKeys, layer.values + offset, query, scores, stride, out};
    switch (num_heads) {
      case 1: return attend_heads<1>(span, heads);
      case 2: return attend_heads<2>(span, heads);
      case 3: return attend_heads<3>(span, heads);
      default: return attend_heads<4>(span, heads);
    }
  }

  int groups() const { return model_.num_heads / model_.num_kv_heads; }

  // Numbers of one position: all KV heads.
  std::int64_t row_width() const { return static_cast<std::int64_t>(model_.num_kv_heads) * model_.head_width; }

  // Where a position's K or V begins.
  std::int64_t place(int token, int position) const {
    const int size = model_.block_size;
    const std::int64_t block = step_.kv_blocks[step_.tables[token] + position / size];
    return (block * size + position % size) * row_width();
  }

  // Positions [start, end) of a token's row; scores begin at `first`, where a group of keys begins.
  struct Span {
    int token, first, start, end;

    // Which of sixteen positions are within.
    __mmask16 seen(int position) const {
      if (position >= start && position + kKeys <= end) return 0xffff;
      return static_cast<__mmask16>(below(end - position) & ~below(start - position));
    }

    static unsigned below(int count) { return count >= 16 ? 0xffffu : count > 0 ? (1u << count) - 1u : 0u; }
  };

  // Replaces `size` scores by exp(scale * score - the largest) as bfloat16, and by zero outside the span, packed to
  // the front of the scores' memory; returns their sum. `size` is a multiple of sixteen.
  static float exponentiate(float* scores, const Span& span, float scale, int size) {
    const __m512 factor = _mm512_set1_ps(scale);
    const auto scaled = [&](int at) { return _mm512_mul_ps(_mm512_loadu_ps(scores + at), factor); };
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int at = 0; at < size; at += kKeys) {
      const __mmask16 seen = span.seen(span.first + at);
      largest = _mm512_mask_max_ps(largest, seen, largest, scaled(at));
    }
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 total = _mm512_setzero_ps();
    bf16* weights = reinterpret_cast<bf16*>(scores);  // never ahead of what is read
    for (int at = 0; at < size; at += kKeys) {
      const __m512 raised = exp_of_negative(_mm512_sub_ps(scaled(at), shift));
      const __m512 each = _mm512_maskz_mov_ps(span.seen(span.first + at), raised);
      store_bf16(weights + at, each);
      total = _mm512_add_ps(total, each);
    }
    return _mm512_reduce_add_ps(total);
  }

  // Writes 32 numbers whose sums were taken by pairs, times a scale.
  static void write(const __m512* sums, __m512 scale, bf16* out) {
    __m512 first, last;
    in_order(_mm512_mul_ps(sums[0], scale), _mm512_mul_ps(sums[1], scale), &first, &last);
    store_bf16(out, first);
    store_bf16(out + 16, last);
  }

 private:
  // Query heads of one KV head: its keys and values, queries and out [heads, head width], scores
  // [heads, stride].
  struct Heads {
    const bf16* keys;
    const bf16* values;
    const bf16* query;
    float* scores;
    int stride;
    bf16* out;
  };

  template <int kHeads>
  void attend_heads(const Span& span, const Heads& heads) const {
    constexpr int kGroups = kHeads == 1 ? 8 : 4;  // as many sums as hide the time that each takes
    int position = span.first;
    for (; position + kGroups * kKeys <= span.end; position += kGroups * kKeys) {
      score<kHeads, kGroups>(span, position, heads);
    }
    for (; position < span.end; position += kKeys) score<kHeads, 1>(span, position, heads);
    float factors[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      float* scores = heads.scores + static_cast<std::ptrdiff_t>(h) * heads.stride;
      factors[h] = 1.0f / exponentiate(scores, span, model_.attention_scale, heads.stride);
    }
    gather<kHeads>(span, heads, factors);
  }

  // Fills the scores, not yet scaled, of a few groups of sixteen positions. What lies in a block behind the end, or
  // before the start, is read and not used.
  template <int kHeads, int kGroups>
  void score(const Span& span, int position, const Heads& heads) const {
    const bf16* keys[kGroups];
    __m512 sums[kHeads][kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      keys[g] = heads.keys + place(span.token, position + g * kKeys);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sums[h][g] = _mm512_setzero_ps();
    }
    for (int k = 0; k < model_.head_width; k += 2) {
      __m512bh pairs[kGroups];
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) pairs[g] = load_bf16(keys[g] + k * kKeys);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const __m512bh q = load_pair(heads.query + h * model_.head_width + k);
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) sums[h][g] = _mm512_dpbf16_ps(sums[h][g], pairs[g], q);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      float* at = heads.scores + static_cast<std::ptrdiff_t>(h) * heads.stride + (position - span.first);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) _mm512_storeu_ps(at + g * kKeys, sums[h][g]);
    }
  }

  // out = factor * Σ weight · V for each head, 64 numbers of a head at a time, two positions at a time. What lies
  // outside the span is not read: it may be anything.
  template <int kHeads>
  void gather(const Span& span, const Heads& heads, const float* factors) const {
    const int width = model_.head_width;
    for (int k = 0; k < width; k += 2 * kLanes) {
      // A head whose width is an odd number of registers reads its last one twice.
      const int next = k + kLanes < width ? k + kLanes : k;
      __m512 sums[kHeads][4];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < 4; ++j) sums[h][j] = _mm512_setzero_ps();
      }
      const auto add = [&](int position, const bf16* a, const bf16* b) __attribute__((always_inline)) {
        const __m512i bits[2][2] = {{load_bits(a + k), load_bits(a + next)}, {load_bits(b + k), load_bits(b + next)}};
        const bf16* weights = reinterpret_cast<const bf16*>(heads.scores) + (position - span.first);
        __m512bh values[4];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          values[2 * j] = (__m512bh)_mm512_unpacklo_epi16(bits[0][j], bits[1][j]);
          values[2 * j + 1] = (__m512bh)_mm512_unpackhi_epi16(bits[0][j], bits[1][j]);
        }
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          const __m512bh both = load_pair(weights + static_cast<std::ptrdiff_t>(h) * 2 * heads.stride);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) sums[h][j] = _mm512_dpbf16_ps(sums[h][j], values[j], both);
        }
      };
      for (int position = span.start / 2 * 2; position < span.end;) {
        const bf16* rows = heads.values + place(span.token, position);
        const int end = std::min(span.end, (position / kKeys + 1) * kKeys);
        // One that is not seen has the weight zero; the other one's numbers stand in for its own.
        if (position < span.start) {
          add(position, rows + row_width(), rows + row_width());
          position += 2, rows += 2 * row_width();
        }
        for (; position + 1 < end; position += 2, rows += 2 * row_width()) add(position, rows, rows + row_width());
        if (position < end) add(position, rows, rows), position += 2;
      }
      for (int h = 0; h < kHeads; ++h) {
        const __m512 scale = _mm512_set1_ps(factors[h]);
        write(sums[h], scale, heads.out + h * width + k);
        if (next != k) write(sums[h] + 2, scale, heads.out + h * width + next);
      }
    }
  }

  const Model& model_;
  const Step& step_;
};

}  // namespace quickchange
