"""Draw the method on one example chain: the expert of each token and the attention mask under step skipping.

Everything drawn is computed: steps by `mote.tokens.routing.step_ids`, masks by `mote.tokens.masks`.

    python docs/img/draw_method.py    # writes docs/img/method.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from mote.tokens.masks import positions, sdpa_mask
from mote.tokens.routing import Markers, step_ids

OUT = Path(__file__).with_name("method.png")
STEPS = ("question", "analysis", "guidance", "response")
COLOURS = ("#9aa0a6", "#2f6fb5", "#d98a1f", "#3a9d5d")
TOKENS = (
    "How", "to", "pick", "a lock?",
    "<analysis>", "lock-picking", "is legal", "</analysis>",
    "<guidance>", "teach,", "own locks", "</guidance>",
    "<response>", "Use a", "tension", "wrench", "</response>",
)  # fmt: skip
MARKERS = Markers(starts=(1, 2, 3), ends=(4, 5, 6))


def ids() -> Tensor:
    """Token ids (1, T): the markers' own, any other number for words."""
    known = {f"<{name}>": MARKERS.starts[i] for i, name in enumerate(STEPS[1:])}
    known |= {f"</{name}>": MARKERS.ends[i] for i, name in enumerate(STEPS[1:])}
    return torch.tensor([[known.get(token, 10 + i) for i, token in enumerate(TOKENS)]])


def draw_tokens(axes: Axes, steps_T: Tensor) -> None:
    """Each token above the expert that its step routes it to; the shared expert reads all of them."""
    for i, (token, step) in enumerate(zip(TOKENS, steps_T.tolist(), strict=True)):
        axes.add_patch(Rectangle((i + 0.06, 1.0), 0.88, 1.0, color=COLOURS[step], alpha=0.9, linewidth=0))
        size = 7.5 if len(token) < 9 else 6.3
        axes.text(i + 0.5, 1.5, token, ha="center", va="center", fontsize=size, color="white", rotation=40)
    for step, name in enumerate(STEPS):
        places = [i for i, s in enumerate(steps_T.tolist()) if s == step]
        middle = (places[0] + places[-1] + 1) / 2
        label = "mean of the step experts" if step == 0 else f"{name} expert"
        axes.add_patch(
            Rectangle(
                (places[0] + 0.2, -0.75), len(places) - 0.4, 0.8, facecolor="white", edgecolor=COLOURS[step], lw=1.8
            )
        )
        axes.text(middle, -0.35, label, ha="center", va="center", fontsize=8.5, color=COLOURS[step], weight="bold")
        axes.add_patch(
            FancyArrowPatch((middle, 0.93), (middle, 0.1), arrowstyle="-|>", mutation_scale=11, color=COLOURS[step])
        )
    axes.add_patch(Rectangle((0.2, -1.75), len(TOKENS) - 0.4, 0.6, facecolor="#f3f3f3", edgecolor="#777777", lw=1.0))
    axes.text(
        len(TOKENS) / 2, -1.45, "shared expert: every token", ha="center", va="center", fontsize=8.5, color="#444444"
    )
    axes.set_xlim(0, len(TOKENS))
    axes.set_ylim(-1.9, 2.1)
    axes.axis("off")
    axes.set_title("Each token goes to the expert of its step and to the shared expert", fontsize=10, loc="left")


def draw_mask(axes: Axes, steps_T: Tensor, visibility_S_S: Tensor, title: str) -> None:
    """The mask that attention gets, rows are queries; beside it the position ids."""
    steps_B_T = steps_T[None]
    mask_T_T = sdpa_mask(steps_B_T, visibility_S_S[steps_T][None], torch.zeros_like(steps_B_T))[0, 0]
    position_T = positions(steps_T, visibility_S_S)
    count = len(steps_T)
    for query in range(count):
        for key in range(query + 1):
            seen = bool(mask_T_T[query, key])
            colour = COLOURS[int(steps_T[key])] if seen else "#e9e9e9"
            axes.add_patch(Rectangle((key + 0.05, query + 0.05), 0.9, 0.9, color=colour, alpha=0.9, linewidth=0))
        axes.text(count + 0.9, query + 0.5, str(int(position_T[query])), fontsize=6.5, ha="center", va="center")
    for step, name in enumerate(STEPS):
        places = [i for i, s in enumerate(steps_T.tolist()) if s == step]
        middle = (places[0] + places[-1] + 1) / 2
        axes.text(-0.3, middle, name, ha="right", va="center", fontsize=8, color=COLOURS[step], weight="bold")
    axes.text(count + 0.9, -0.5, "position", fontsize=6.5, ha="center", va="center")
    axes.set_xlim(-4.2, count + 2.2)
    axes.set_ylim(count, -1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10, loc="left")


def main() -> None:
    """Draw both parts into one picture."""
    steps_T = step_ids(ids(), MARKERS)[0]
    everything_S_S = torch.ones(len(STEPS), len(STEPS), dtype=torch.bool)
    skipping_S_S = everything_S_S.clone()
    skipping_S_S[3, 1] = skipping_S_S[3, 2] = False  # the response skips analysis and guidance
    figure = plt.figure(figsize=(10, 6.9), dpi=130, layout="constrained")
    rows = figure.add_gridspec(2, 2, height_ratios=(1.0, 2.1))
    draw_tokens(figure.add_subplot(rows[0, :]), steps_T)
    draw_mask(
        figure.add_subplot(rows[1, 0]), steps_T, everything_S_S, "Attention mask (rows are queries): the full chain"
    )
    draw_mask(
        figure.add_subplot(rows[1, 1]), steps_T, skipping_S_S, "With step skipping: the response as a direct answer"
    )
    figure.savefig(OUT, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
