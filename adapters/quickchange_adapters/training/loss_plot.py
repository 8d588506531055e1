"""The log of a run as a picture. Needs matplotlib; knows no loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "loss.png"


def write_loss_plot(log: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw training and validation loss over steps.

    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss, nats a token of the answer", title="Training"
    )
    for key, label, marker in (("loss", "training", ""), ("validation_loss", "validation", "o")):
        points = [(line["step"], line[key]) for line in log if key in line]
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        axes.plot(steps, losses, label=label, marker=marker, markersize=4)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})
