"""The multi-adapter linear: one fused projection of the frozen base plus the step's deltas.

The seam is y = W·x + bias + Σ delta, where W is the base's matrix, or a merged copy's when every
row of the step uses that copy. The plan of the step reaches the layers through a `PlanHolder`
that they share, because a Hugging Face block passes nothing else to its linears.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from quickchange_adapters.arena import Arena
from quickchange_adapters.layout import GroupShape
from quickchange_adapters.ops.deltas import add_deltas, add_head, start_deltas
from quickchange_adapters.ops.linear_weight import LinearWeight
from quickchange_adapters.plan import Projection, StepPlan


@dataclass(slots=True)
class PlanHolder:
    """The current step's plan and the pool's arenas, shared by all layers of a model."""

    plan: StepPlan = field(default_factory=lambda: StepPlan(0))
    arenas: dict[str, Arena] = field(default_factory=dict)


class ProjectionGroup:
    """One block's fused projection: computes all parts on the first call with an input."""

    def __init__(
        self,
        shape: GroupShape,
        layer: int,
        weight: LinearWeight,
        bias: Tensor | None,
        holder: PlanHolder,
    ) -> None:
        self.shape = shape
        self.layer = layer
        self.weight = weight
        self.bias = bias
        self._holder = holder
        self._columns = shape.part_slices
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def compute(self, x: Tensor) -> Tensor:
        """Return the fused output; x [..., in] -> [..., out]."""
        plan = self._holder.plan
        rows = x.reshape(-1, self.shape.in_features)
        weight, bias = self._resident(plan)
        if not plan.has_deltas:
            y = weight.apply(rows, bias)
        else:
            arena = self._holder.arenas[self.shape.kind]
            start_deltas(rows, arena, self.layer, plan)
            y = weight.apply(rows, bias)
            add_deltas(y, rows, arena, self.layer, plan)
        return y.view(*x.shape[:-1], self.shape.out_features)

    def project(self, x: Tensor) -> Projection:
        """Return the fused output of x [tokens, in]; deltas may lie beside it."""
        plan = self._holder.plan
        if plan.tables is None or plan.blocks or plan.windows:
            return Projection(self.compute(x))
        arena = self._holder.arenas[self.shape.kind]
        return plan.tables.project(self.weight, x, self.bias, arena, self.layer)

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return one part's columns; siblings that pass the same tensor share one product."""
        if self.shape.num_parts == 1:
            return self.compute(x)
        if self._output is None or self._input is not x:
            self._input, self._output = x, self.compute(x)
        result = self._output[..., self._columns[index]]
        if index == self.shape.num_parts - 1:
            self._input = self._output = None
        return result

    def _resident(self, plan: StepPlan) -> tuple[LinearWeight, Tensor | None]:
        if plan.merged is None:
            return self.weight, self.bias
        key = (self.shape.kind, self.layer)
        return plan.merged.weights.get(key, self.weight), plan.merged.biases.get(key, self.bias)


class Head(nn.Module):
    """Stands where the base's output head stood; rows are those whose logits are wanted."""

    def __init__(self, weight: LinearWeight, bias: Tensor | None, holder: PlanHolder) -> None:
        super().__init__()
        self.resident = weight
        self.bias_tensor = bias
        self._holder = holder

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; x [..., width] -> [..., vocabulary]."""
        plan = self._holder.plan
        rows = x.reshape(-1, x.shape[-1])
        merged = plan.merged.head if plan.merged is not None else None
        y = (merged or self.resident).apply(rows, self.bias_tensor)
        for block in plan.head_blocks:
            add_head(y, rows, block, is_exact=plan.is_exact)
        return y.view(*x.shape[:-1], -1)


class GroupPart(nn.Module):
    """Stands where the base's q_proj (k_proj, …) stood."""

    def __init__(self, group: ProjectionGroup, index: int) -> None:
        super().__init__()
        self._group = group
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return this part of the group's output; x [..., in] -> [..., out of the part]."""
        return self._group.part(self._index, x)
