"""Wrong and right answers to lesson 07's exercises."""

from bisect import bisect_left

import torch

from course.labs.recording import Recording
from exercise_cases import Case


class MyDecode:
    """One buffer for both; masks instead of slices; the answers in one tensor."""

    def __init__(self, model, sizes, device):
        self.model, self.sizes = model, sorted(sizes)
        self.rows = torch.zeros(2, self.sizes[-1], dtype=torch.int64, device=device)
        self.rows[1] = -1
        self.recordings = {s: Recording(lambda s=s: self.step(s), device) for s in self.sizes}

    def step(self, size):
        ids, positions = self.rows[:, :size]
        ids[:] = self.model(ids, positions)
        positions[:] = torch.where(positions < 0, positions, positions + 1)

    def run(self, ids, positions, count):
        n = ids.shape[0]
        self.rows[1].fill_(-1)
        self.rows[:, :n] = torch.stack((ids, positions))
        recording = self.recordings[self.sizes[bisect_left(self.sizes, n)]]
        tokens = ids.new_empty(count, n)
        for row in tokens:
            recording.replay()
            row.copy_(self.rows[0, :n])
        return tokens


def capture_sizes(max_num_seqs):
    """As the engine's: multiples of 8."""
    return sorted({min(s, max_num_seqs) for s in (1, 2, 4, *range(8, max_num_seqs + 8, 8))})


COPY = "ids.copy_(self.model(ids, positions))"
KEPT = "sizes = [1, 2, 4, 8, *range(16, max_num_seqs, 16)]"
RETURN = "return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]"
CASES = {
    "launches_and_padding": Case(
        mutants=[
            ("200 * 30 + 5", "200 * 35", "does not wait"),
            ("200 * 30 + 5", "200 * 5", "until it is launched"),
            ("200 * 30 + 5", "200 * 30", "It has to run, too"),
            ("20 + 200 * 5", "200 * 25", "paid once"),
            ("20 + 200 * 5", "25", "makes none faster"),
            ("24 - 17", "24", "are padding"),
            ("24 - 17", "17 - 16", "cannot hold"),
            ("24 - 17", "32 - 17", "a smaller size"),
            ("2 + 50 * 6", "50 * 8", "the plain loop"),
            ("2 + 50 * 6", "50 * 6", "hides behind nothing"),
            ("2 + 50 * 6", "50 * 2 + 6", "The longer of the two"),
        ],
        other={"eager_us": 6005, "replayed_us": 1020.0, "padded": 7, "overlapped_ms": 302},
    ),
    "my_decode": Case(
        mutants=[
            (COPY, "ids = self.model(ids, positions)", "answer into ids"),
            (COPY, "self.ids = self.model(ids, positions)", "gave its name to another"),
            ("positions += positions >= 0", "positions += 1", "stored keys in the cache"),
            ("positions += positions >= 0", "pass", "move positions on by one"),
            (
                "positions += positions >= 0",
                "positions[positions >= 0] += 1",
                "MyDecode raised an error" if torch.cuda.is_available() else "how many are meant",
            ),
            ("positions += positions >= 0", "positions = positions + 1", "move positions on"),
            ("self.ids[:n] = ids", "self.ids = ids", "buffers that were captured"),
            (
                "self.positions[:n] = positions\n",
                "self.positions = positions.clone()\n",
                "captured",
            ),
            ("        self.positions[n:] = -1\n", "", "not in this batch"),
            ("self.positions[n:] = -1", "self.positions[n:] = 0", "not in this batch"),
            (".clone()", "", "the last one"),
            ("self.ids[:n].clone()", "self.ids[:size].clone()", "Padding is not an answer"),
            ("min(size for size in self.recordings if size >= n)", "n", "with captures for"),
            ("min(size for size in self.recordings if size >= n)", "8", "the smallest that holds"),
            ("if size >= n", "if size > n", "the smallest that holds"),
            ("self.recordings[size].replay()", "self.step(size)", "never again"),
        ],
        other=MyDecode,
    ),
    "between": Case(
        mutants=[
            (RETURN, "return sizes", "finds no size"),
            ("if size < max_num_seqs]", "if size <= max_num_seqs]", "stands there twice"),
            (RETURN, "return [*sizes, max_num_seqs + 16]", "No size may be above"),
            (RETURN, "return sizes + [max_num_seqs] * (max_num_seqs > 8)", "No size may be above"),
            (KEPT, "sizes = range(1, max_num_seqs)", "Each takes time and memory"),
            (KEPT, "sizes = []", "computed in vain"),
            (KEPT, "sizes = [1, 2, 4, 8, 16]", "computed in vain"),
        ],
        other=capture_sizes,
    ),
}
