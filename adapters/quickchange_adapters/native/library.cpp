// The functions that Python calls. No Python and no PyTorch here: pointers, integers and floats.

#include <omp.h>

#include <new>

#include "step.h"

namespace quickchange {
namespace {

// Where a number of W [out, in] lies in its packed form. Those of an even column and the next lie together.
template <typename Number>
std::int64_t place(int row, int column, int num_inputs) {
  const int within = row % kPanel * 2 + column % 2;
  return static_cast<std::int64_t>(row / kPanel) * kPanel * num_inputs + column / 2 * 2 * kPanel +
         (sizeof(Number) == 1 ? byte_place(within) : within);
}

// What is behind the last output is zero.
template <typename Number>
void pack(const Number* weight, int num_outputs, int num_inputs, Number* packed) {
  const int num_rows = (num_outputs + kPanel - 1) / kPanel * kPanel;
  for (int row = 0; row < num_rows; ++row) {
    const Number* from = weight + static_cast<std::int64_t>(row) * num_inputs;
    for (int k = 0; k < num_inputs; k += 2) {
      Number* to = packed + place<Number>(row, k, num_inputs);
      row < num_outputs ? std::memcpy(to, from + k, 2 * sizeof(Number)) : std::memset(to, 0, 2 * sizeof(Number));
    }
  }
}

template <typename Number>
void unpack(const Number* packed, int num_outputs, int num_inputs, Number* weight) {
  for (int row = 0; row < num_outputs; ++row) {
    Number* to = weight + static_cast<std::int64_t>(row) * num_inputs;
    for (int k = 0; k < num_inputs; k += 2) {
      std::memcpy(to + k, packed + place<Number>(row, k, num_inputs), 2 * sizeof(Number));
    }
  }
}

void product(const bf16* x, int num_tokens, const Linear& linear, int num_outputs, int num_inputs, bf16* y,
             Team& team, bf16* unpacked, bool in_tiles) {
  const Linear matrix{linear.weight, nullptr, linear.scales};
  TileUnit unit;
  team.share(0, (num_outputs + kPanel - 1) / kPanel, 1, [&](int panel) {
    const int num_columns = std::min(kPanel, num_outputs - panel * kPanel);
    for_tiles(num_tokens, in_tiles ? kRowsInTiles : kTile, [&](int first, int count) {
      Tile tile;
      const Panels panels(matrix, num_inputs, num_tokens, unpacked, in_tiles ? &unit : nullptr);
      panels.multiply_tile(panel, x, first, count, Ahead{}, &tile);
      for (int m = 0; m < count; ++m) {
        bf16* out = y + static_cast<std::int64_t>(first + m) * num_outputs + panel * kPanel;
        for (int i = 0; i < num_columns; ++i) {
          const float bias = linear.bias ? to_float(linear.bias[panel * kPanel + i]) : 0.0f;
          out[i] = to_bf16(tile.values[m][i] + bias);
        }
      }
    });
  });
}

}  // namespace
}  // namespace quickchange

using namespace quickchange;

#define QC_EXPORT __attribute__((visibility("default")))

extern "C" {

QC_EXPORT int qc_struct_sizes(std::int32_t* sizes) {
  const std::size_t each[] = {sizeof(Arena), sizeof(Linear), sizeof(Layer), sizeof(Model),
                              sizeof(Term),  sizeof(RowBlock), sizeof(Step)};
  int count = 0;
  for (std::size_t size : each) sizes[count++] = static_cast<std::int32_t>(size);
  return count;
}

// Has products computed by AMX from now on, or not. Called while none is. Returns 0, or 1 when the system does not
// allow it: then nothing changes. Whether the processor has the instructions, the caller knows.
QC_EXPORT int qc_use_tiles(int on) {
  if (on && !may_use_tiles()) return 1;
  uses_tiles = on != 0;
  return 0;
}

// `size`: of a number, 2 for bfloat16 and 1 for int8.
QC_EXPORT void qc_pack(const void* weight, int num_outputs, int num_inputs, int size, void* packed) {
  if (size == 2) {
    pack(static_cast<const bf16*>(weight), num_outputs, num_inputs, static_cast<bf16*>(packed));
  } else {
    pack(static_cast<const std::int8_t*>(weight), num_outputs, num_inputs, static_cast<std::int8_t*>(packed));
  }
}

QC_EXPORT void qc_unpack(const void* packed, int num_outputs, int num_inputs, int size, void* weight) {
  if (size == 2) {
    unpack(static_cast<const bf16*>(packed), num_outputs, num_inputs, static_cast<bf16*>(weight));
  } else {
    unpack(static_cast<const std::int8_t*>(packed), num_outputs, num_inputs, static_cast<std::int8_t*>(weight));
  }
}

// y [tokens, out] = x [tokens, in] · Wᵀ + bias, on as many threads as the caller's products take. Returns 0, or 1
// when there was not enough memory.
QC_EXPORT int qc_product(const bf16* x, int num_tokens, const Linear* linear, int num_outputs, int num_inputs,
                         bf16* y) {
  try {
    const bool in_tiles = uses_tiles && num_inputs % kTileInputs == 0;
    const std::size_t size = Panels::unpacked_size(*linear, num_inputs, num_tokens, in_tiles);
    std::vector<bf16> unpacked(size * static_cast<std::size_t>(omp_get_max_threads()));
    Team team(1, omp_get_max_threads());
#pragma omp parallel
    product(x, num_tokens, *linear, num_outputs, num_inputs, y, team,
            unpacked.data() + size * static_cast<std::size_t>(omp_get_thread_num()), in_tiles);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// For each row of x [rows, columns] its highest number and where that is, as `highest` says.
QC_EXPORT void qc_highest(const float* x, int num_rows, int num_columns, float* highest_of, std::int32_t* places) {
#pragma omp parallel for if (num_rows > 1)
  for (int row = 0; row < num_rows; ++row) {
    highest_of[row] = highest(x + static_cast<std::int64_t>(row) * num_columns, num_columns, places + row);
  }
}

// Null when there was not enough memory.
QC_EXPORT void* qc_new_scratch() { return new (std::nothrow) Scratch(); }

QC_EXPORT void qc_delete_scratch(void* scratch) { delete static_cast<Scratch*>(scratch); }

// Runs a step, on as many threads as the caller's products take. Returns 0, or 1 when there was not enough memory;
// nothing of it counts then.
QC_EXPORT int qc_run_step(const Model* model, const Step* step, void* scratch) {
  try {
    Scratch& buffers = *static_cast<Scratch*>(scratch);
    buffers.prepare(*model, *step, uses_tiles);
    Team team(StepRun::num_stages(*model), omp_get_max_threads());
#pragma omp parallel
    StepRun(*model, *step, buffers, team, buffers.threads[omp_get_thread_num()]).run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
