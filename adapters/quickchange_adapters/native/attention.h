// Attention of one token over its KV blocks, read in place. Sums run in the order of the positions.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

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
    store_bf16(out + i, _mm512_mul_ps(load_floats(x + i), factor));
    store_bf16(out + i, _mm512_mul_ps(load_floats(out + i), load_floats(weight + i)));
  }
}

class Attention {
 public:
  Attention(const Model& model, const Step& step) : model_(model), step_(step) {}

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
    const std::size_t bytes = sizeof(bf16) * model_.num_kv_heads * width;
    const bf16* key = qkv + model_.num_heads * width;
    std::memcpy(layer.keys + place(token, position, 0), key, bytes);
    std::memcpy(layer.values + place(token, position, 0), key + model_.num_kv_heads * width, bytes);
  }

  // Fills out [head width] with one head's attention of one token.
  void attend(const Layer& layer, int token, int head, const bf16* query, std::vector<float>* scores, bf16* out) const {
    const int kv_head = head / (model_.num_heads / model_.num_kv_heads);
    const int end = step_.positions[token] + 1;
    const int start = layer.window && end > layer.window ? end - static_cast<int>(layer.window) : 0;
    const int count = end - start;
    if (static_cast<int>(scores->size()) < count + 16) scores->resize(count + 16);
    const float largest = score(layer, token, kv_head, query, start, end, scores->data());
    const float total = exponentiate(scores->data(), count, largest);
    gather(layer, token, kv_head, start, count, scores->data(), 1.0f / total, out);
  }

 private:
  // Where a position's K or V of a KV head begins.
  std::int64_t place(int token, int position, int kv_head) const {
    const int size = model_.block_size;
    const std::int64_t block = step_.kv_blocks[step_.tables[token] + position / size];
    return ((block * size + position % size) * model_.num_kv_heads + kv_head) * model_.head_width;
  }

  // Fills scores of positions [start, end) and returns the largest.
  float score(const Layer& layer, int token, int kv_head, const bf16* query, int start, int end, float* scores) const {
    const int width = model_.head_width;
    const __m512 scale = _mm512_set1_ps(model_.attention_scale);
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int position = start; position < end; position += 16) {
      const int count = std::min(16, end - position);
      const bf16* keys[16];
      for (int i = 0; i < 16; ++i) keys[i] = layer.keys + place(token, position + std::min(i, count - 1), kv_head);
      __m512 sums[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
      for (int k = 0; k < width; k += kLanes) {
        const __m512bh q = load_bf16(query + k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], load_bf16(keys[i] + k), q);
      }
      const __m512 scaled = _mm512_mul_ps(sum_each(sums), scale);
      const __mmask16 seen = static_cast<__mmask16>((1u << count) - 1u);
      _mm512_storeu_ps(scores + (position - start), scaled);
      largest = _mm512_mask_max_ps(largest, seen, largest, scaled);
    }
    return _mm512_reduce_max_ps(largest);
  }

  // Replaces scores by exp(score - largest), with zeros behind the last, and returns their sum.
  static float exponentiate(float* scores, int count, float largest) {
    const __m512 shift = _mm512_set1_ps(largest);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
      const int left = std::min(16, count - i);
      const __mmask16 seen = static_cast<__mmask16>((1u << left) - 1u);
      const __m512 raised = exp_floats(_mm512_sub_ps(_mm512_loadu_ps(scores + i), shift));
      const __m512 weights = _mm512_maskz_mov_ps(seen, raised);
      _mm512_storeu_ps(scores + i, weights);
      total = _mm512_add_ps(total, weights);
    }
    return _mm512_reduce_add_ps(total);
  }

  // out = factor * Σ weight · V, 32 numbers of the head at a time.
  void gather(const Layer& layer, int token, int kv_head, int start, int count, const float* weights, float factor,
              bf16* out) const {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int k = 0; k < model_.head_width; k += 2 * kLanes) {
      const bool is_wide = k + kLanes < model_.head_width;
      __m512 sums[4];
      for (auto& sum : sums) sum = _mm512_setzero_ps();
      for (int i = 0; i < count; ++i) {
        const bf16* value = layer.values + place(token, start + i, kv_head) + k;
        const __m512 weight = _mm512_set1_ps(weights[i]);
        const __m512i bits = load_bits(value);
        sums[0] = _mm512_fmadd_ps(weight, even_floats(bits), sums[0]);
        sums[1] = _mm512_fmadd_ps(weight, odd_floats(bits), sums[1]);
        if (is_wide) {
          const __m512i more = load_bits(value + kLanes);
          sums[2] = _mm512_fmadd_ps(weight, even_floats(more), sums[2]);
          sums[3] = _mm512_fmadd_ps(weight, odd_floats(more), sums[3]);
        }
      }
      write(sums, scale, out + k);
      if (is_wide) write(sums + 2, scale, out + k + kLanes);
    }
  }

  static void write(const __m512* sums, __m512 scale, bf16* out) {
    __m512 first, last;
    interleave(_mm512_mul_ps(sums[0], scale), _mm512_mul_ps(sums[1], scale), &first, &last);
    store_bf16(out, first);
    store_bf16(out + 16, last);
  }

  const Model& model_;
  const Step& step_;
};

}  // namespace quickchange
