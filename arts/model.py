"""Draws arts/model.png, the picture of the method in the README: python arts/model.py"""

import os
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OLD, NEW, DATA, GREY = "#0072B2", "#D55E00", "#009E73", "0.35"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, *, fill: float) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.06", linewidth=1.6, edgecolor=colour)
    shape.set_facecolor((*shape.get_edgecolor()[:3], fill))
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11)


def group(axes: Axes, x: float, y: float, width: float, height: float, title: str, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.1", linewidth=1.2, linestyle="--", edgecolor=colour, fill=False
        )
    )
    axes.text(x + width / 2, y + height + 0.22, title, ha="center", va="bottom", fontsize=12, color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=14, linewidth=1.6, color=colour, connectionstyle=style
        )
    )


def draw() -> Figure:
    figure = Figure(figsize=(10, 4.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 4.4), aspect="equal")
    axes.axis("off")

    group(axes, 0.4, 1.5, 2.3, 2.1, "old scholar  $H_{i-1}$, frozen", OLD)
    box(axes, 0.6, 2.75, 1.9, 0.65, "generator $G_{i-1}$", OLD, fill=0.12)
    box(axes, 0.6, 1.7, 1.9, 0.65, "solver $S_{i-1}$", OLD, fill=0.12)
    box(axes, 0.6, 0.3, 1.9, 0.65, "task $i$:  data $D_i$", DATA, fill=0.12)

    box(axes, 4.0, 2.55, 1.75, 0.85, "replayed pairs\n$(x',\\ y'=S_{i-1}(x'))$", OLD, fill=0.12)
    box(axes, 4.0, 0.3, 1.75, 0.65, "real pairs  $(x,\\ y)$", DATA, fill=0.12)
    arrow(axes, (2.58, 3.1), (3.9, 3.05), OLD)
    axes.text(3.28, 3.22, "$x'$", color=OLD, fontsize=12, ha="center")
    arrow(axes, (2.58, 2.0), (3.9, 2.75), OLD)
    axes.text(3.35, 2.18, "$y'$", color=OLD, fontsize=12, ha="center")
    arrow(axes, (2.58, 0.62), (3.9, 0.62), DATA)

    group(axes, 7.2, 1.5, 2.35, 2.1, "new scholar  $H_i$", NEW)
    box(axes, 7.4, 2.75, 1.95, 0.65, "generator $G_i$", NEW, fill=0.12)
    box(axes, 7.4, 1.7, 1.95, 0.65, "solver $S_i$", NEW, fill=0.12)
    arrow(axes, (5.85, 3.05), (7.3, 3.08), OLD)
    arrow(axes, (5.85, 2.8), (7.3, 2.1), OLD)
    arrow(axes, (5.85, 0.72), (7.35, 2.72), DATA, bend=0.05)
    arrow(axes, (5.85, 0.58), (7.6, 1.6), DATA, bend=0.2)
    axes.text(6.6, 3.2, "inputs", color=GREY, fontsize=10, ha="center")
    axes.text(6.45, 0.42, "pairs", color=GREY, fontsize=10, ha="center")
    axes.text(
        8.4,
        0.85,
        "$L(S_i) = r\\,\\ell(S_i(x),\\,y)$\n$\\quad+\\ (1-r)\\,\\ell(S_i(x'),\\,y')$",
        ha="center",
        va="center",
        fontsize=12.5,
    )
    axes.text(8.4, 0.28, "then $H_i$ is the old scholar of task $i+1$", ha="center", fontsize=10, color=GREY)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=110)
