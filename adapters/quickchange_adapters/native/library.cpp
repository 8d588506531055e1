// The functions that Python calls. No Python and no PyTorch here: pointers, integers and floats.

#include <omp.h>

#include "step.h"

namespace quickchange {
namespace {

// Pairs of inputs of 32 outputs side by side; what is behind the last output is zero.
void pack(const bf16* weight, int num_outputs, int num_inputs, bf16* packed) {
  const int num_panels = (num_outputs + kPanel - 1) / kPanel;
  for (int panel = 0; panel < num_panels; ++panel) {
    bf16* out = packed + static_cast<std::int64_t>(panel) * kPanel * num_inputs;
    for (int k = 0; k < num_inputs; ++k) {
      for (int n = 0; n < kPanel; ++n) {
        const int row = panel * kPanel + n;
        const bf16 value = row < num_outputs ? weight[static_cast<std::int64_t>(row) * num_inputs + k] : 0;
        out[(k / 2) * 2 * kPanel + n * 2 + k % 2] = value;
      }
    }
  }
}

void unpack(const bf16* packed, int num_outputs, int num_inputs, bf16* weight) {
  for (int row = 0; row < num_outputs; ++row) {
    const bf16* panel = panel_of(packed, row / kPanel, num_inputs);
    for (int k = 0; k < num_inputs; ++k) {
      weight[static_cast<std::int64_t>(row) * num_inputs + k] =
          panel[(k / 2) * 2 * kPanel + (row % kPanel) * 2 + k % 2];
    }
  }
}

void product(const bf16* x, int num_tokens, const Linear& linear, int num_outputs, int num_inputs, bf16* y,
             Team& team) {
  team.share(0, (num_outputs + kPanel - 1) / kPanel, [&](int panel) {
    const int num_columns = std::min(kPanel, num_outputs - panel * kPanel);
    for_tiles(num_tokens, [&](int first, int count) {
      Tile tile;
      Panels{linear.weight, num_inputs, team.size()}.multiply_tile(panel, x, first, count, &tile);
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

QC_EXPORT void qc_pack(const bf16* weight, int num_outputs, int num_inputs, bf16* packed) {
  pack(weight, num_outputs, num_inputs, packed);
}

QC_EXPORT void qc_unpack(const bf16* packed, int num_outputs, int num_inputs, bf16* weight) {
  unpack(packed, num_outputs, num_inputs, weight);
}

// y [tokens, out] = x [tokens, in] · Wᵀ + bias, on as many threads as the caller's products take.
QC_EXPORT void qc_product(const bf16* x, int num_tokens, const bf16* packed, const bf16* bias, int num_outputs, int num_inputs,
                          bf16* y) {
  Team team(1);
  const Linear linear{packed, bias};
#pragma omp parallel
  {
#pragma omp single
    team.set_size(omp_get_num_threads());
    product(x, num_tokens, linear, num_outputs, num_inputs, y, team);
  }
}

QC_EXPORT void* qc_new_scratch() { return new Scratch(); }

QC_EXPORT void qc_delete_scratch(void* scratch) { delete static_cast<Scratch*>(scratch); }

// Runs a step, on as many threads as the caller's products take. Returns 0, or 1 when there was not enough memory; nothing of it counts then.
QC_EXPORT int qc_run_step(const Model* model, const Step* step, void* scratch) {
  try {
    Scratch& buffers = *static_cast<Scratch*>(scratch);
    StepRun::prepare(*model, *step, buffers);
    Team team(StepRun::num_stages(*model));
#pragma omp parallel
    {
#pragma omp single
      team.set_size(omp_get_num_threads());
      StepRun(*model, *step, buffers, team).run();
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // extern "C"
