// What a step needs beyond what the caller gave: buffers and tables, made before its threads begin.
#pragma once

#include <omp.h>

#include <array>
#include <memory>

#include "attention_units.h"
#include "deltas.h"
#include "panels.h"
#include "wanted_step.h"

namespace quickchange {

enum Group { kQkv, kOutput, kGateUp, kDown };

// One thread's own.
struct ThreadBuffers {
  std::vector<float> scores;
  std::vector<bf16> unpacked[2];
};

// Kept between steps, so that little is allocated.
struct Scratch {
  std::vector<bf16> normed, qkv, attended, active;
  std::array<GroupDeltas, 4> deltas;
  AttentionUnits attention;
  LineList kv_lines;  // of the rows' blocks, in a layer's keys and in its values
  std::vector<ThreadBuffers> threads;
  bool uses_tiles = false;  // in this step
  WantedStep wanted;
  std::unique_ptr<Scratch> of_wanted;  // made when first needed; has no threads of its own

  // Makes buffers and tables; called by one thread, before `run`: what is thrown among several threads
  // ends the process, so none of them allocates.
  void prepare(const Model& model, const Step& step, bool in_tiles) {
    uses_tiles = in_tiles;
    prepare_tokens(model, step);
    list_kv(model, step);
    std::size_t num_scores = attention.most_scores(step);
    wanted.prepare(model, step);
    if (wanted.is_part() && step.num_wanted) {
      if (!of_wanted) of_wanted = std::make_unique<Scratch>();
      of_wanted->uses_tiles = in_tiles;
      of_wanted->prepare_tokens(model, wanted.step());
      num_scores = std::max(num_scores, of_wanted->attention.most_scores(wanted.step()));
    }
    prepare_threads(num_scores, unpacked_size(model, step, in_tiles));
  }

 private:
  static constexpr std::size_t kMostKvLines = 32768;  // 2 MiB of keys, and as much of values

  // What a run over these tokens needs; all but what belongs to the threads.
  void prepare_tokens(const Model& model, const Step& step) {
    const std::size_t tokens = static_cast<std::size_t>(step.num_tokens);
    grow(normed, tokens * model.width);
    grow(qkv, tokens * model.arenas[kQkv].num_outputs);
    grow(attended, tokens * model.num_heads * model.head_width);
    grow(active, tokens * model.intermediate);
    for (int group = 0; group < 4; ++group) {
      const Term* terms = step.terms + static_cast<std::ptrdiff_t>(group) * step.num_terms;
      deltas[group].prepare(model.arenas[group], step.blocks, step.num_blocks, terms, step.num_tokens);
    }
    attention.list(model, step, uses_tiles);
  }

  void list_kv(const Model& model, const Step& step) {
    kv_lines.start(kPieceShift, kMostKvLines);
    const std::int64_t row = static_cast<std::int64_t>(model.num_kv_heads) * model.head_width * sizeof(bf16) / kLine;
    for (int token = 0; token < step.num_tokens; ++token) {
      const int table = step.tables[token];
      if (token + 1 < step.num_tokens && step.tables[token + 1] == table) continue;  // of the same row, further on
      const int num_positions = Attention::scores_size(step.positions[token]);
      for (int position = 0; position < num_positions; position += model.block_size) {
        const std::int64_t block = step.kv_blocks[table + position / model.block_size];
        kv_lines.add(block * model.block_size * row, std::min(model.block_size, num_positions - position) * row);
      }
    }
  }

  void prepare_threads(std::size_t num_scores, std::size_t num_unpacked) {
    const std::size_t count = static_cast<std::size_t>(omp_get_max_threads());
    if (threads.size() < count) threads.resize(count);
    for (ThreadBuffers& own : threads) {
      grow(own.scores, num_scores);
      for (auto& unpacked : own.unpacked) grow(unpacked, num_unpacked);
    }
  }

  static std::size_t unpacked_size(const Model& model, const Step& step, bool in_tiles) {
    const int tokens = step.num_tokens;
    std::size_t most = Panels::unpacked_size(step.head, model.width, tokens, in_tiles);
    for (int i = 0; i < model.num_layers; ++i) {
      const Layer& layer = step.layers[i];
      most = std::max({most, Panels::unpacked_size(layer.qkv, model.width, tokens, in_tiles),
                       Panels::unpacked_size(layer.output, model.num_heads * model.head_width, tokens, in_tiles),
                       Panels::unpacked_size(layer.gate_up, model.width, tokens, in_tiles),
                       Panels::unpacked_size(layer.down, model.intermediate, tokens, in_tiles)});
    }
    return most;
  }

  template <typename Number>
  static void grow(std::vector<Number>& buffer, std::size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  }
};

}  // namespace quickchange
