"""The drawings of lesson 01. Each figure's `alt_text` says in words what it shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from course.show.plots import BLACK, BLUE, MARKERS, ORANGE, VERMILLION, figure

DROPPED = {"color": "white", "edgecolor": "#888888", "hatch": "///"}
AGAIN = {"facecolor": "#FCF0D6", "edgecolor": ORANGE, "hatch": "///"}
NEW = {"facecolor": BLUE, "edgecolor": BLUE}


def attention_weights(weights: Any) -> Any:
    """A table of causal weights [queries, keys], darker where larger."""
    from matplotlib import pyplot as plt

    size = len(weights)
    fig, axes = plt.subplots(figsize=(3.4, 3.0))
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1.3)
    for row in range(size):
        for column in range(size):
            text, points = f"{weights[row, column]:.2f}", 10.5
            if column > row:
                text, points = "masked", 8
            axes.text(column, row, text, ha="center", va="center", fontsize=points)
    axes.set(xticks=range(size), yticks=range(size))
    axes.set(xlabel="key of token", ylabel="query of token", title="Attention weights")
    axes.grid(visible=False)
    rows = (
        f"token {i}: {', '.join(f'{w:.2f}' for w in row[: i + 1])}" for i, row in enumerate(weights)
    )
    fig.alt_text = f"Attention weights, those of later tokens masked. {'; '.join(rows)}."
    return fig


def rope_turns(table: Any, pairs: Sequence[int], positions: int = 6) -> Any:
    """The point (1, 0) of some pairs, turned by the first positions of a `rope_table`."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(1, len(pairs), figsize=(2.5 * len(pairs), 2.8))
    speeds = []
    for panel, pair in zip(panels, pairs, strict=True):
        angle = float(table[1, 1, pair].atan2(table[1, 0, pair]))
        panel.add_patch(plt.Circle((0, 0), 1, fill=False, color="#CCCCCC"))
        for p in range(positions):
            x, y = table[p, :, pair].tolist()
            panel.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE})
            if angle > 0.5 or p == 0 or (p == positions - 1 and angle > 0.05):
                panel.text(1.2 * x, 1.2 * y, str(p), ha="center", va="center", fontsize=10)
        panel.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
        panel.set_title(f"pair {pair}: {angle:.3f} rad a position", fontsize=10.5)
        panel.axis("off")
        speeds.append(f"pair {pair} by {angle:.3f} radians")
    fig.alt_text = (
        f"Arrows on a circle, turned by positions 0 to {positions - 1}. Each position turns "
        f"{', '.join(speeds)}; the slowest arrows lie on each other."
    )
    return fig


def kept_words(words: Sequence[str], probs: Sequence[float], kept: dict[str, list[bool]]) -> Any:
    """The likeliest words once a filter: filled bars are kept, hatched ones dropped."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(1, len(kept), figsize=(8, 2.9), sharey=True)
    for panel, (title, keep) in zip(panels, kept.items(), strict=True):
        for place, (p, stays) in enumerate(zip(probs, keep, strict=True)):
            panel.bar(place, p, **({"color": BLUE} if stays else DROPPED))
        panel.set_xticks(range(len(words)), words, rotation=60)
        panel.set_title(f"{title}: {sum(keep)} kept")
        panel.grid(visible=False, axis="x")
    panels[0].set_ylabel("probability")
    counts = ", ".join(f"{name} keeps {sum(keep)}" for name, keep in kept.items())
    fig.alt_text = (
        f"Bars of the {len(words)} likeliest words, from {words[0]} at {probs[0]:.2f} down to "
        f"{words[-1]} at {probs[-1]:.3f}. Filled are kept, hatched dropped: {counts}."
    )
    return fig


def recomputed(prompt: int, count: int) -> Any:
    """One row a step: the tokens it reads, those that an earlier step read already hatched."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 2.4))
    for step in range(count):
        for place in range(prompt + step):
            before = step > 0 and place < prompt + step - 1
            axes.add_patch(plt.Rectangle((place, step), 0.9, 0.85, **(AGAIN if before else NEW)))
        axes.text(prompt + step + 0.2, step + 0.45, str(prompt + step), va="center", fontsize=10)
    axes.set(xlim=(-0.1, prompt + count + 1), ylim=(count, -0.1), yticks=[])
    axes.set(xticks=[p + 0.45 for p in range(prompt + count - 1)])
    axes.set_xticklabels(range(prompt + count - 1))
    axes.set(xlabel="position (tokens)", ylabel="step")
    axes.set_title("Filled: read for the first time. Hatched: read again. Right: tokens read.")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    fig.alt_text = (
        f"{count} rows, one a step, of {prompt} to {prompt + count - 1} tokens. In the first row "
        "all tokens are new, in every later one only the last; the rest was read before."
    )
    return fig


@dataclass(frozen=True)
class StepCost:
    """Measured steps of one model on one device, and t(n) = t0 + F(n) / r through two of them."""

    name: str  # of model and device
    lengths: Sequence[int]  # tokens in the text
    seconds: Sequence[float]  # of a step, at each length
    fitted: tuple[int, int]  # which two of them gave t0 and r
    flops: Callable[[int], int]  # F

    @property
    def rate(self) -> float:
        """r: operations a second."""
        i, j = self.fitted
        work = self.flops(self.lengths[j]) - self.flops(self.lengths[i])
        return work / (self.seconds[j] - self.seconds[i])

    @property
    def fixed(self) -> float:
        """t0: seconds that a step takes at any length."""
        i = self.fitted[0]
        return self.seconds[i] - self.flops(self.lengths[i]) / self.rate

    def step(self, n: int) -> float:
        """Predicted seconds of a step over n tokens."""
        return self.fixed + self.flops(n) / self.rate

    def answer(self, prompt: int, count: int) -> list[float]:
        """Predicted seconds until each of `count` tokens has come after a prompt."""
        clock = [0.0]
        for i in range(count):
            clock.append(clock[-1] + self.step(prompt + i))
        return clock[1:]

    def __str__(self) -> str:
        return f"{self.name}: t0 = {1000 * self.fixed:.1f} ms, r = {self.rate / 1e9:,.0f} GFLOP/s"


class OverlappedCost(StepCost):
    """On a GPU, which computes while operations are started: the longer of t0 and F(n) / r.

    The first of the two fitted steps gave t0, the second, a long one, r.
    """

    @property
    def rate(self) -> float:
        j = self.fitted[1]
        return self.flops(self.lengths[j]) / self.seconds[j]

    @property
    def fixed(self) -> float:
        return self.seconds[self.fitted[0]]

    def step(self, n: int) -> float:
        return max(self.fixed, self.flops(n) / self.rate)


def step_and_answer(
    costs: Sequence[StepCost], clock: Sequence[float], prompt: int, machine: str
) -> Any:
    """Left: a step against the text's length. Right: a whole answer's clock, of the first model."""
    fig, (left, right) = figure("What recomputing costs", machine, columns=2, height=4.3)
    for cost, colour, marker in zip(costs, (BLUE, VERMILLION), MARKERS, strict=False):
        line = range(cost.lengths[0], cost.lengths[-1] + 1, 8)
        shape = [1000 * cost.step(n) for n in line]
        left.plot(line, shape, color=colour, marker="", label=f"{cost.name}: t(n)")
        for i, (n, value) in enumerate(zip(cost.lengths, cost.seconds, strict=True)):
            face = "white" if i in cost.fitted else colour
            left.plot(n, 1000 * value, marker, color=colour, markerfacecolor=face)
    left.set(xlabel="tokens in the text, n", ylabel="ms a step", title="One step")
    if len(costs) > 1:  # a CPU and a GPU are orders of magnitude apart
        left.set(xscale="log", yscale="log")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter("{x:,g}")
    else:
        left.set_ylim(bottom=0)
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    predicted = costs[0].answer(prompt, len(clock))
    draw_answer(right, predicted, clock)
    steps = "; ".join(
        f"{cost.name}: {1000 * cost.seconds[0]:.1f} ms at {cost.lengths[0]} tokens, "
        f"{1000 * cost.seconds[-1]:.1f} at {cost.lengths[-1]}, predicted "
        f"{1000 * cost.step(cost.lengths[-1]):.1f}"
        for cost in costs
    )
    fig.alt_text = (
        f"Left, a step against the text's length: {steps}. Right, the clock of {len(clock)} tokens "
        f"bends upwards to {clock[-1]:.1f} s; predicted were {predicted[-1]:.1f}."
    )
    return fig


def draw_answer(axes: Any, predicted: Sequence[float], clock: Sequence[float]) -> None:
    """Predicted and measured seconds until token N; and if all cost what the first eighth did."""
    count = len(clock)
    early = count // 8
    axes.plot(range(1, count + 1), predicted, color=BLUE, marker="", label="sum of t(n)")
    shown = range(early // 2 - 1, count, early // 2)
    axes.plot([i + 1 for i in shown], [clock[i] for i in shown], "o", color=BLACK, label="measured")
    straight = count / early * clock[early - 1]
    label = f"if all cost what the first {early} did"
    axes.plot([0, count], [0, straight], "--", color="#777777", marker="", label=label)
    axes.set(xlabel="tokens of the answer, N", ylabel="seconds", title="A whole answer")
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18))
