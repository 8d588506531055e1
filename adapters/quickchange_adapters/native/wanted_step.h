// What is left of a step behind the last layer's keys and values: the tokens whose logits are wanted.
//
// Nobody reads the last layer's output of another token, so its attention and products run over these alone: a
// prompt's chunk has one, or none.
#pragma once

#include <algorithm>
#include <vector>

#include "tables.h"

namespace quickchange {

class WantedStep {
 public:
  // Makes the tables of the wanted tokens' own step; called by one thread.
  void prepare(const Model& model, const Step& step) {
    const std::size_t count = static_cast<std::size_t>(step.num_wanted);
    is_part_ = step.num_wanted < step.num_tokens && std::is_sorted(step.wanted, step.wanted + count);
    if (!is_part_) return;
    step_ = step;
    step_.num_tokens = step.num_wanted;
    const std::size_t num_hidden = count * static_cast<std::size_t>(model.width);
    if (hidden_.size() < num_hidden) hidden_.resize(num_hidden);
    tables_.resize(count), positions_.resize(count), own_places_.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      positions_[i] = step.positions[step.wanted[i]];
      tables_[i] = step.tables[step.wanted[i]];
      own_places_[i] = static_cast<std::int32_t>(i);
    }
    blocks_.clear();
    for (int b = 0; b < step.num_blocks; ++b) {
      RowBlock block = step.blocks[b];
      block.start = first_from(step, block.start);
      block.end = first_from(step, block.end);
      if (block.start < block.end) blocks_.push_back(block);
    }
    step_.num_blocks = static_cast<std::int32_t>(blocks_.size());
    step_.hidden = hidden_.data();
    step_.positions = positions_.data();
    step_.tables = tables_.data();
    step_.wanted = own_places_.data();
    step_.blocks = blocks_.data();
  }

  // Whether these are some of the tokens, and not all.
  bool is_part() const { return is_part_; }

  const Step& step() const { return step_; }

 private:
  static std::int32_t first_from(const Step& step, std::int32_t token) {
    return static_cast<std::int32_t>(std::lower_bound(step.wanted, step.wanted + step.num_wanted, token) - step.wanted);
  }

  bool is_part_ = false;
  Step step_;
  std::vector<bf16> hidden_;
  std::vector<std::int32_t> positions_, tables_, own_places_;
  std::vector<RowBlock> blocks_;
};

}  // namespace quickchange
