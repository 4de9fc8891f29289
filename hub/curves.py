"""The curves of a training run as a picture for the model card."""

from pathlib import Path
from typing import Any

FILE = "assets/curves.png"


def draw(training: dict[str, Any], folder: Path) -> None:
    """Write FILE into `folder`, from the "training" of `history`; the same numbers give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, looks = training["curves"], training["looks"]
    on = "held-out samples" if training["held_out"] else "fixed samples"
    panels = [
        ("loss", [(curves["step"], curves["loss"], "training"), (looks["step"], looks["loss"], on)]),
        ("effective rank of features", [(looks["step"], looks[f"{name}_rank"], name) for name in ("pooled", "tokens")]),
        ("learning rate", [(curves["step"], curves["lr"], "")]),
        ("gradient norm", [(curves["step"], curves["grad_norm"], "")]),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 5.2))
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        for x, y, label in lines:
            shown = [float("nan") if value is None else value for value in y]
            axis.plot(x, shown, label=label or None, linewidth=1.2, marker="." if len(x) < 30 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if any(label and x for x, _, label in lines):
            axis.legend(fontsize=8)
    figure.tight_layout()
    (folder / FILE).parent.mkdir(exist_ok=True)
    figure.savefig(folder / FILE, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
