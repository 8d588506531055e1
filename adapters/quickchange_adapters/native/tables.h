// What Python hands over: a model, once, and the tables of one step. Mirrored in library.py.
#pragma once

#include "vector.h"

namespace quickchange {

extern "C" {

// One projection group's arenas over all layers: A [layers, rows, parts, in], B [layers, rows, out].
struct Arena {
  const bf16* a;
  const bf16* b;
  std::int64_t num_rows;
  std::int32_t num_parts;
  std::int32_t num_inputs;
  std::int32_t num_outputs;
  std::int32_t part_ends[4];

  const bf16* a_of(int layer, int row) const {
    return a + (static_cast<std::int64_t>(layer) * num_rows + row) * num_parts * num_inputs;
  }
  const bf16* b_of(int layer, int row) const {
    return b + (static_cast<std::int64_t>(layer) * num_rows + row) * num_outputs;
  }
  int part_of(int column) const {
    int part = 0;
    while (part + 1 < num_parts && column >= part_ends[part]) ++part;
    return part;
  }
};

// A packed matrix. Without scales it holds bfloat16; with them int8, and each output's scale. Both, and
// the bias where there is one, are padded to whole panels, but for the head's bias.
struct Linear {
  const void* weight;
  const bf16* bias;
  const float* scales;
};

struct Layer {
  const bf16* attention_norm;
  const bf16* feed_forward_norm;
  const bf16* query_norm;  // over a head's width; null: none
  const bf16* key_norm;
  Linear qkv, output, gate_up, down;
  bf16* keys;  // as attention.h says
  bf16* values;
  std::int64_t window;  // 0: all positions are seen
};

struct Model {
  std::int32_t num_layers, width, num_heads, num_kv_heads, head_width, intermediate, vocabulary, block_size;
  float epsilon, attention_scale;
  std::int64_t activation;  // 0: SiLU, 1: GELU by tanh
  const bf16* cosines;  // [positions, head width / 2]
  const bf16* sines;
  const bf16* final_norm;
  Arena arenas[4];  // qkv, output, gate_up, down
};

// Rank rows of one adapter in one group; num_rows 0: the adapter does not touch the group.
struct Term {
  std::int32_t first_row, num_rows, has_bias;
  float weight;
};

// Tokens [start, end) share terms [first_term, end_term).
struct RowBlock {
  std::int32_t start, end, first_term, end_term;
};

struct Step {
  std::int32_t num_tokens, num_blocks, num_terms, num_wanted;
  const Layer* layers;
  Linear head;
  bf16* hidden;                   // [tokens, width]: embeddings; overwritten
  const std::int32_t* positions;  // [tokens]
  const std::int32_t* tables;     // [tokens]: where a token's row of KV blocks begins in kv_blocks
  const std::int32_t* kv_blocks;
  const RowBlock* blocks;
  const Term* terms;  // [4 groups, terms]
  const std::int32_t* wanted;  // [wanted]: tokens whose logits are wanted
  bf16* wanted_hidden;         // [wanted, width]: normed
  float* logits;               // [wanted, vocabulary]
  double* stage_seconds;       // of each stage, over all layers, added to; null: not measured
};

}  // extern "C"

}  // namespace quickchange
