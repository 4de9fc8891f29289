"""The curves of a training run: small plots, and the picture of them for the model card."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel: TypeAlias = tuple[str, Sequence[tuple[Sequence[int], Sequence[Any], str]]]  # title, lines of (x, y, label)

FILE = "assets/curves.png"


def draw(training: dict[str, Any], folder: Path) -> None:
    """Write FILE into `folder`, from the "training" of `history`; the same numbers give the same bytes."""
    curves, looks = training["curves"], training["looks"]
    on = "held-out samples" if training["held_out"] else "fixed samples"
    panels = [
        ("loss", [(curves["step"], curves["loss"], "training"), (looks["step"], looks["loss"], on)]),
        ("effective rank of features", [(looks["step"], looks[f"{name}_rank"], name) for name in ("pooled", "tokens")]),
        ("learning rate", [(curves["step"], curves["lr"], "")]),
        ("gradient norm", [(curves["step"], curves["grad_norm"], "")]),
    ]
    (folder / FILE).parent.mkdir(exist_ok=True)
    with plotted(panels) as figure:
        figure.savefig(folder / FILE, dpi=100, metadata={"Software": None})


@contextmanager
def plotted(panels: Sequence[Panel]) -> Iterator["Figure"]:
    """Small line plots in two columns; a None in a line is a gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 2.6 * rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
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
    try:
        yield figure
    finally:
        pyplot.close(figure)
