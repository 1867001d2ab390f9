"""Do two stages say the same? Greedy tokens are equal, up to near ties.

The same row of a matrix product differs by about 1e-6 between batch sizes (in float32), so two
tokens whose logits are almost equal may change places, and all that follows then differs. So
answers are compared up to the first token that won by less than TIE.
"""

from dataclasses import dataclass

from course.stages.common import StageResult

TIE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}  # in logits, by dtype


@dataclass(frozen=True)
class Agreement:
    """How much was compared, and found equal."""

    compared: int  # tokens that were to be equal, and were
    total: int
    ties: int  # requests that have a near tie; what comes after it was not compared

    def __str__(self) -> str:
        return (
            f"{self.compared:,} of {self.total:,} tokens compared, all equal; "
            f"{self.ties} requests have a near tie"
        )


def compare(result: StageResult, reference: StageResult) -> Agreement:
    """Compare a stage's tokens with those of one that kept its gaps (01 or 02).

    The reference may have served only the first of the requests; the others are not compared.
    Raises AssertionError at the first token that differs and was no near tie.
    """
    if not reference.gaps:
        raise ValueError(f"stage {reference.number:02} kept no gaps; compare with 01 or 02")
    count = len(reference.token_ids)
    if result.workload.prompts[:count] != reference.workload.prompts:
        raise ValueError("the two stages did not run the same prompts")
    tie, compared, ties = TIE[reference.dtype], 0, 0
    pairs = zip(result.token_ids[:count], reference.token_ids, strict=True)
    for i, (ours, theirs) in enumerate(pairs):
        certain = next((t for t, gap in enumerate(reference.gaps[i]) if gap < tie), len(theirs))
        for t in range(certain):
            if ours[t] != theirs[t]:
                raise AssertionError(
                    f"request {i}, token {t}: stage {result.number:02} says {ours[t]}, stage "
                    f"{reference.number:02} {theirs[t]}, by {reference.gaps[i][t]:.2g} logits"
                )
        compared += certain
        ties += certain < len(theirs)
    return Agreement(compared, reference.num_tokens, ties)
