// How a step's attention is cut into units of work.
#pragma once

#include <algorithm>
#include <vector>

#include "block_attention.h"
#include "tile_attention.h"

namespace quickchange {

// Heads [head, head + num_heads) of tokens [token, token + num_tokens) of one row, and of one KV head.
struct AttentionUnit {
  int token, num_tokens, head, num_heads;
};

class AttentionUnits {
 public:
  // Tokens that follow each other share what is read: by tiles up to sixteen of one head, if they are more than the
  // heads that would; without, as many with some heads as are computed together. Far from the start of a row they do
  // not: their scores would take more memory than is near.
  void list(const Model& model, const Step& step, bool in_tiles) {
    in_tiles_ = in_tiles, has_blocks_ = false;
    units_.clear();
    const int groups = model.num_heads / model.num_kv_heads, together = heads_together(model, step);
    const int block = in_tiles ? kTileRows : BlockAttention::num_tokens(together);
    for (int token = 0, count; token < step.num_tokens; token += count) {
      for (count = 1; count < block && follows(step, token + count); ++count) {
      }
      const bool is_block = in_tiles ? count > groups : count == block;
      if (is_block && step.positions[token] + count <= kLongestBlock) {
        has_blocks_ = true;
        list_heads(model, {token, count, 0, in_tiles ? 1 : together});
      } else {
        count = 1;
        list_heads(model, {token, 1, 0, in_tiles ? kTileRows : together});
      }
    }
  }

  const std::vector<AttentionUnit>& units() const { return units_; }

  // Whether some units have several tokens: they take too long to be taken in runs.
  bool has_blocks() const { return has_blocks_; }

  // How many scores a thread has to hold.
  std::size_t most_scores(const Step& step) const {
    std::size_t most = 0;
    for (const AttentionUnit& unit : units_) {
      most = std::max(most, scores_size(step, unit));
    }
    return most;
  }

 private:
  static constexpr int kFewTokens = 4;
  static constexpr int kLongestBlock = 8192;  // positions that tokens with common units see

  std::size_t scores_size(const Step& step, const AttentionUnit& unit) const {
    const int last = step.positions[unit.token] + unit.num_tokens - 1;
    if (in_tiles_) return TileAttention::scores_size(last, unit.num_tokens * unit.num_heads);
    if (unit.num_tokens > 1) return BlockAttention::scores_size(last);
    return static_cast<std::size_t>(Attention::scores_size(last)) * unit.num_heads;
  }

  // Adds units like the first for all heads.
  void list_heads(const Model& model, AttentionUnit unit) {
    const int groups = model.num_heads / model.num_kv_heads, most = unit.num_heads;
    for (int head = 0; head < model.num_heads; head += groups) {
      for (int within = 0; within < groups; within += most) {
        unit.head = head + within;
        unit.num_heads = std::min(most, groups - within);
        units_.push_back(unit);
      }
    }
  }

  // Heads of one KV head that are computed together without tiles: one where tokens are few, so that there is work
  // for all threads.
  static int heads_together(const Model& model, const Step& step) {
    return step.num_tokens < kFewTokens ? 1 : std::min(model.num_heads / model.num_kv_heads, kMaxHeads);
  }

  // Whether a token is the next one of the same row.
  static bool follows(const Step& step, int token) {
    return token < step.num_tokens && step.tables[token] == step.tables[token - 1] &&
           step.positions[token] == step.positions[token - 1] + 1;
  }

  bool in_tiles_ = false, has_blocks_ = false;
  std::vector<AttentionUnit> units_;
};

}  // namespace quickchange
