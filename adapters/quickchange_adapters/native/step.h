// One step of a Llama-shaped model over a packed row of tokens, from embeddings to logits.
//
// | stage of a layer | shared out by |
// |---|---|
// | norm | token |
// | shrink, then product and expand, of qkv | unit, panel |
// | norm and rotate heads, store K and V | token |
// | attention | some heads of a token, or of a few |
// | shrink, product and expand of the output, added to the hidden state | unit, panel |
// | norm; shrink, product and expand of gate and up, their activation | token; unit, panel |
// | shrink, product and expand of down, added to the hidden state | unit, panel |
//
// A stage begins when the one before it is done. From the last layer's attention on, a step runs over the tokens
// whose logits are wanted.
#pragma once

#include <omp.h>

#include <chrono>

#include "scratch.h"
#include "team.h"

namespace quickchange {

class StepRun {
 public:
  StepRun(const Model& model, const Step& step, Scratch& scratch, Team& team, ThreadBuffers& own)
      : model_(model),
        step_(step),
        scratch_(scratch),
        team_(team),
        attention_(model, step),
        own_(own) {
    if (step.stage_seconds && omp_get_thread_num() == 0) clock_ = step.stage_seconds;
    last_ = Clock::now();
  }

  static int num_stages(const Model& model) { return model.num_layers * kStagesOfLayer + 3; }

  // Every thread of the team calls this.
  void run() {
    const int last = model_.num_layers - 1;
    for (int layer = 0; layer < last; ++layer) {
      store_kv(layer);
      finish_layer(layer);
    }
    store_kv(last);
    if (!scratch_.wanted.is_part()) return finish(last);
    if (step_.num_wanted == 0) return;
    StepRun wanted(model_, scratch_.wanted.step(), *scratch_.of_wanted, team_, own_);
    gather_wanted(wanted);
    wanted.finish(last);
  }

 private:
  using Clock = std::chrono::steady_clock;

  static constexpr int kStagesOfLayer = 12, kStagesOfKv = 4;
  static constexpr int kRunsOfThread = 4;  // or more, so that threads end together
  static constexpr int kLongestRun = 16;

  // The first stages of a layer: up to where what other tokens need of one is done.
  void store_kv(int index) {
    const Layer& layer = step_.layers[index];
    int stage = index * kStagesOfLayer;
    norm(stage++, layer.attention_norm);
    shrink(stage++, kQkv, index, scratch_.normed.data(), model_.width);
    project_qkv(stage++, layer, index);
    store(stage++, layer);
  }

  // What another step needs of this one's tokens to end in its place: their hidden states and queries.
  void gather_wanted(const StepRun& other) {
    const std::int64_t num_outputs = model_.arenas[kQkv].num_outputs;
    team_.share(num_stages(model_) - 1, step_.num_wanted, run_of(step_.num_wanted), [&](int i) {
      const std::int64_t token = step_.wanted[i];
      std::memcpy(other.step_.hidden + i * model_.width, step_.hidden + token * model_.width,
                  sizeof(bf16) * model_.width);
      std::memcpy(other.scratch_.qkv.data() + i * num_outputs, scratch_.qkv.data() + token * num_outputs,
                  sizeof(bf16) * num_outputs);
    });
  }

  void finish(int last_layer) {
    finish_layer(last_layer);
    run_head();
  }

  void finish_layer(int index) {
    const Layer& layer = step_.layers[index];
    int stage = index * kStagesOfLayer + kStagesOfKv;
    attend(stage++, layer);
    const int heads_width = model_.num_heads * model_.head_width;
    shrink(stage++, kOutput, index, scratch_.attended.data(), heads_width);
    add_to_hidden(stage++, kOutput, layer.output, index, scratch_.attended.data(), heads_width);
    norm(stage++, layer.feed_forward_norm);
    shrink(stage++, kGateUp, index, scratch_.normed.data(), model_.width);
    activate(stage++, layer, index);
    shrink(stage++, kDown, index, scratch_.active.data(), model_.intermediate);
    add_to_hidden(stage++, kDown, layer.down, index, scratch_.active.data(), model_.intermediate);
  }

  // The first thread notes how long a stage took, if somebody wants to know.
  void end(int stage) {
    if (!clock_) return;
    const int first_of_head = model_.num_layers * kStagesOfLayer;
    const auto now = Clock::now();
    const int place = stage < first_of_head ? stage % kStagesOfLayer : kStagesOfLayer + stage - first_of_head;
    clock_[place] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  // How many units of a few microseconds or less a thread takes in a row.
  int run_of(int num_units) const { return std::clamp(num_units / (kRunsOfThread * num_threads_), 1, kLongestRun); }

  void norm(int stage, const bf16* weight) {
    team_.share(stage, step_.num_tokens, run_of(step_.num_tokens), [&](int token) {
      const std::int64_t at = static_cast<std::int64_t>(token) * model_.width;
      normalise(step_.hidden + at, model_.width, weight, model_.epsilon, scratch_.normed.data() + at);
    });
    end(stage);
  }

  void shrink(int stage, Group group, int layer, const bf16* x, std::int64_t stride) {
    GroupDeltas& deltas = scratch_.deltas[group];
    if (deltas.num_units() == 0) return;
    team_.share(stage, deltas.num_units(), 1, [&](int unit) { deltas.shrink(unit, layer, x, stride); });
    end(stage);
  }

  // The product of one stage: x [tokens, inputs] times a group's matrix in a layer.
  struct Product {
    Group group;
    int layer;
    const Linear& linear;
    const bf16* x;
    int num_inputs;
  };

  // Computes one panel for a tile of tokens: product, bias and deltas.
  void compute(const Product& product, int panel, int first, int count, Tile* tile, bf16* unpacked) const {
    const Panels panels(product.linear, product.num_inputs, step_.num_tokens, unpacked, tiles());
    panels.multiply_tile(panel, product.x, first, count, ahead_of(product, panel, first), tile);
    scratch_.deltas[product.group].expand(product.layer, panel, first, count, tile);
  }

  // What a tile fetches beside the next panel: for the next panel's deltas, and for later stages.
  Ahead ahead_of(const Product& product, int panel, int first) const {
    const int tile = first / tile_size_, num_tiles = (step_.num_tokens + tile_size_ - 1) / tile_size_;
    const int pairs = product.num_inputs / 2, num_panels = model_.arenas[product.group].num_outputs / kPanel;
    Ahead ahead;
    const Slot slot{panel * num_tiles + tile, num_panels * num_tiles, pairs};
    fetch_for_later(product, slot, ahead.lines);
    ahead.lines[2] = scratch_.deltas[product.group].lines_of_b(product.layer, panel + 1, tile, num_tiles, pairs);
    return ahead;
  }

  // Which of a stage's tiles one is, and how many lines it can fetch of each kind.
  struct Slot {
    int index, count, num_lines;
  };

  // The rank rows of the next group, and, beside the two largest products, the next layer's keys and values.
  void fetch_for_later(const Product& product, const Slot& slot, Lines* lines) const {
    const int layer = product.layer, next = layer + 1;
    const bool is_end = next == model_.num_layers;
    const auto rank_rows = [&](Group group, int of_layer) {
      return scratch_.deltas[group].lines_of_a(of_layer, slot.index, slot.count, slot.num_lines);
    };
    const auto kv = [&](const bf16* base) {
      return scratch_.kv_lines.part(base, slot.index, slot.count, slot.num_lines);
    };
    if (product.group == kQkv) {
      lines[0] = rank_rows(kOutput, layer);
    } else if (product.group == kOutput) {
      lines[0] = rank_rows(kGateUp, layer);
    } else if (product.group == kGateUp) {
      lines[0] = rank_rows(kDown, layer);
      if (!is_end) lines[1] = kv(step_.layers[next].keys);
    } else if (!is_end) {
      lines[0] = rank_rows(kQkv, next);
      lines[1] = kv(step_.layers[next].values);
    }
  }

  void project_qkv(int stage, const Layer& layer, int index) {
    const int num_outputs = model_.arenas[kQkv].num_outputs;
    const Product product{kQkv, index, layer.qkv, scratch_.normed.data(), model_.width};
    team_.share(stage, num_outputs / kPanel, 1, [&](int panel) {
      for_tiles(step_.num_tokens, tile_size_, [&](int first, int count) {
        Tile tile;
        compute(product, panel, first, count, &tile, buffer(0));
        for (int m = 0; m < count; ++m) {
          bf16* out = scratch_.qkv.data() + static_cast<std::int64_t>(first + m) * num_outputs + panel * kPanel;
          store_bf16(out, _mm512_load_ps(tile.values[m]));
          store_bf16(out + 16, _mm512_load_ps(tile.values[m] + 16));
        }
      });
    });
    end(stage);
  }

  // Neighbours' keys lie in the same cache lines, another reason to take tokens in runs.
  void store(int stage, const Layer& layer) {
    const int num_outputs = model_.arenas[kQkv].num_outputs;
    team_.share(stage, step_.num_tokens, run_of(step_.num_tokens), [&](int token) {
      attention_.store(layer, token, scratch_.qkv.data() + static_cast<std::int64_t>(token) * num_outputs);
    });
    end(stage);
  }

  void attend(int stage, const Layer& layer) {
    if (scratch_.uses_tiles) return attend_in_tiles(stage, layer);
    const std::int64_t num_outputs = model_.arenas[kQkv].num_outputs, width = model_.head_width;
    const std::int64_t out_width = model_.num_heads * width;
    const BlockAttention blocks(model_, attention_, own_.scores.data());
    const std::vector<AttentionUnit>& units = scratch_.attention.units();
    const int num_units = static_cast<int>(units.size());
    const int run = scratch_.attention.has_blocks() ? 1 : run_of(num_units);
    team_.share(stage, num_units, run, [&](int index) {
      const AttentionUnit& unit = units[index];
      const int position = step_.positions[unit.token], end = position + unit.num_tokens;
      const bool sees_all = !layer.window || end <= layer.window;
      if (unit.num_tokens * unit.num_heads == BlockAttention::kQueries && unit.num_tokens > 1 && sees_all) {
        return blocks.attend(layer, unit.token, position, unit.head, unit.num_heads, scratch_.qkv.data(), num_outputs,
                             scratch_.attended.data(), out_width);
      }
      for (int token = unit.token; token < unit.token + unit.num_tokens; ++token) {
        const std::int64_t column = unit.head * width;
        attention_.attend(layer, token, unit.head, unit.num_heads,
                          scratch_.qkv.data() + token * num_outputs + column, own_.scores.data(),
                          scratch_.attended.data() + token * out_width + column);
      }
    });
    end(stage);
  }

  void attend_in_tiles(int stage, const Layer& layer) {
    const std::int64_t num_outputs = model_.arenas[kQkv].num_outputs, width = model_.head_width;
    const std::int64_t out_width = model_.num_heads * width;
    const TileAttention attention(model_, attention_, tile_unit_, own_.scores.data());
    const int num_units = static_cast<int>(scratch_.attention.units().size());
    team_.share(stage, num_units, 1, [&](int index) {
      const AttentionUnit& unit = scratch_.attention.units()[index];
      const bool is_head = unit.num_heads == 1;
      attention.attend(layer, {unit.token, is_head ? unit.num_tokens : unit.num_heads,
                               scratch_.qkv.data() + unit.token * num_outputs + unit.head * width,
                               is_head ? num_outputs : width,
                               scratch_.attended.data() + unit.token * out_width + unit.head * width,
                               is_head ? out_width : width, step_.positions[unit.token], is_head ? 1 : 0,
                               unit.head / attention_.groups() * width});
    });
    end(stage);
  }

  void add_to_hidden(int stage, Group group, const Linear& linear, int index, const bf16* x, int num_inputs) {
    const Product product{group, index, linear, x, num_inputs};
    team_.share(stage, model_.width / kPanel, 1, [&](int panel) {
      for_tiles(step_.num_tokens, tile_size_, [&](int first, int count) {
        Tile tile;
        compute(product, panel, first, count, &tile, buffer(0));
        for (int m = 0; m < count; ++m) {
          bf16* out = step_.hidden + static_cast<std::int64_t>(first + m) * model_.width + panel * kPanel;
          store_bf16(out, _mm512_add_ps(load_floats(out), _mm512_load_ps(tile.values[m])));
          store_bf16(out + 16, _mm512_add_ps(load_floats(out + 16), _mm512_load_ps(tile.values[m] + 16)));
        }
      });
    });
    end(stage);
  }

  void activate(int stage, const Layer& layer, int index) {
    const int half = model_.intermediate / kPanel;
    const Product product{kGateUp, index, layer.gate_up, scratch_.normed.data(), model_.width};
    team_.share(stage, half, 1, [&](int panel) {
      for_tiles(step_.num_tokens, tile_size_, [&](int first, int count) {
        Tile gate, up;
        compute(product, panel, first, count, &gate, buffer(0));
        compute(product, half + panel, first, count, &up, buffer(1));
        for (int m = 0; m < count; ++m) {
          bf16* out = scratch_.active.data() + static_cast<std::int64_t>(first + m) * model_.intermediate;
          for (int i = 0; i < kPanel; i += 16) {
            const __m512 value = activation(_mm512_load_ps(gate.values[m] + i));
            store_bf16(out + panel * kPanel + i, _mm512_mul_ps(value, _mm512_load_ps(up.values[m] + i)));
          }
        }
      });
    });
    end(stage);
  }

  __m512 activation(__m512 x) const {
    __m512 inner = x;
    if (model_.activation == 1) {  // GELU by tanh: x · sigmoid(2 · sqrt(2 / pi) · (x + 0.044715 x³))
      const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
      inner = _mm512_mul_ps(_mm512_set1_ps(1.5957691216057308f),
                            _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x));
    }
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 raised = exp_floats(_mm512_sub_ps(_mm512_setzero_ps(), inner));
    return _mm512_div_ps(x, _mm512_add_ps(one, raised));
  }

  void run_head() {
    const int stage = model_.num_layers * kStagesOfLayer;
    team_.share(stage, step_.num_wanted, 1, [&](int i) {
      const bf16* hidden = step_.hidden + static_cast<std::int64_t>(step_.wanted[i]) * model_.width;
      bf16* out = step_.wanted_hidden + static_cast<std::int64_t>(i) * model_.width;
      normalise(hidden, model_.width, model_.final_norm, model_.epsilon, out);
    });
    end(stage);
    const int num_panels = (model_.vocabulary + kPanel - 1) / kPanel;
    constexpr int kChunk = 4;
    team_.share(stage + 1, (num_panels + kChunk - 1) / kChunk, 1, [&](int chunk) {
      for (int panel = chunk * kChunk; panel < std::min(num_panels, (chunk + 1) * kChunk); ++panel) head_panel(panel);
    });
    end(stage + 1);
  }

  void head_panel(int panel) {
    const Linear head{step_.head.weight, nullptr, step_.head.scales};
    for_tiles(step_.num_wanted, tile_size_, [&](int first, int count) {
      Tile tile;
      const Panels panels(head, model_.width, step_.num_wanted, buffer(0), tiles());
      panels.multiply_tile(panel, step_.wanted_hidden, first, count, Ahead{}, &tile);
      const int num_columns = std::min(kPanel, model_.vocabulary - panel * kPanel);
      for (int m = 0; m < count; ++m) {
        float* out = step_.logits + static_cast<std::int64_t>(first + m) * model_.vocabulary + panel * kPanel;
        std::memcpy(out, tile.values[m], sizeof(float) * num_columns);
        if (step_.head.bias) {
          for (int i = 0; i < num_columns; ++i) out[i] += to_float(step_.head.bias[panel * kPanel + i]);
        }
      }
    });
  }

  bf16* buffer(int i) const { return own_.unpacked[i].data(); }

  TileUnit* tiles() const { return scratch_.uses_tiles ? &tile_unit_ : nullptr; }

  const Model& model_;
  const Step& step_;
  const int num_threads_ = omp_get_num_threads();
  Scratch& scratch_;
  Team& team_;
  Attention attention_;
  ThreadBuffers& own_;
  mutable TileUnit tile_unit_;
  const int tile_size_ = scratch_.uses_tiles ? kRowsInTiles : kTile;
  double* clock_ = nullptr;
  Clock::time_point last_;
};

}  // namespace quickchange
