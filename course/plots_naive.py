"""The drawings of lesson 01: attention weights, RoPE's turns, kept words, and what a step costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from course.plots import BLACK, BLUE, MARKERS, VERMILLION, figure

DROPPED = {"color": "white", "edgecolor": "#888888", "hatch": "///"}


def attention_weights(weights: Any) -> Any:
    """A table of weights [queries, keys], darker where larger."""
    from matplotlib import pyplot as plt

    size = len(weights)
    fig, axes = plt.subplots(figsize=(3.4, 3.0))
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1.3)
    for row in range(size):
        for column in range(size):
            text = f"{weights[row, column]:.2f}" if column <= row else "masked"
            size_of_text = 10.5 if column <= row else 8
            axes.text(column, row, text, ha="center", va="center", fontsize=size_of_text)
    axes.set(xticks=range(size), yticks=range(size))
    axes.set(xlabel="key of token", ylabel="query of token", title="Attention weights")
    axes.grid(visible=False)
    return fig


def rope_turns(table: Any, pairs: Sequence[int], positions: int = 6) -> Any:
    """The point (1, 0) of some pairs, turned by the first positions of a `rope_table`."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(1, len(pairs), figsize=(2.5 * len(pairs), 2.7))
    for panel, pair in zip(panels, pairs, strict=True):
        for p in range(positions):
            x, y = table[p, :, pair].tolist()
            panel.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE})
            if p == 0 or abs(y - table[p - 1, 1, pair]) + abs(x - table[p - 1, 0, pair]) > 0.08:
                panel.text(1.18 * x, 1.18 * y, str(p), ha="center", va="center", fontsize=9)
        angle = float(table[1, 1, pair].atan2(table[1, 0, pair]))
        panel.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])
        panel.set_title(f"pair {pair}: {angle:.3f} rad a position", fontsize=10)
        panel.grid(visible=False)
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
    return fig


@dataclass(frozen=True)
class StepCost:
    """Measured steps of one model on one device, and the line t0 + F(n) / r through two of them."""

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


def step_and_answer(
    costs: Sequence[StepCost], clock: Sequence[float], prompt: int, machine: str
) -> Any:
    """Left: a step against the text's length. Right: a whole answer's clock, of the first model."""
    fig, (left, right) = figure("What recomputing costs", machine, columns=2, height=3.9)
    for cost, colour, marker in zip(costs, (BLUE, VERMILLION), MARKERS, strict=False):
        line = range(cost.lengths[0], cost.lengths[-1] + 1, 8)
        shape = [1000 * cost.step(n) for n in line]
        left.plot(line, shape, color=colour, marker="", label=f"{cost.name}: t(n)")
        for i, (n, value) in enumerate(zip(cost.lengths, cost.seconds, strict=True)):
            face = "white" if i in cost.fitted else colour
            left.plot(n, 1000 * value, marker, color=colour, markerfacecolor=face)
    left.set(xlabel="tokens in the text, n", ylabel="ms a step", title="One step")
    left.set_ylim(bottom=0)
    left.legend(fontsize=9, loc="upper left")
    if len(costs) > 1:  # a CPU and a GPU are orders of magnitude apart
        left.set(xscale="log", yscale="log")
    draw_answer(right, costs[0].answer(prompt, len(clock)), clock)
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
    axes.legend(fontsize=9, loc="upper left")
