"""A slice of the hostile workloads; `python tests/helpers/hostile.py` runs all 10,000."""

import pytest
from counting_engine import CountingDecoder
from hostile import hostile

SLICE = 120
PARTS = 2


@pytest.mark.parametrize("part", range(PARTS))
def test_hostile_workloads_are_exact(part):
    with hostile() as work:
        for seed in range(part * SLICE // PARTS, (part + 1) * SLICE // PARTS):
            work.run(seed)
    for name in ("preempted", "failed steps", "on two ranks", "ended by abort", "ended by stop"):
        assert work.counts[name] > 0, f"nothing was {name}: the slice proves less than it says"
    assert work.counts["further answers"] > 0, "no prompt had several answers"


def test_one_wrong_hash_is_seen(monkeypatch):
    """A model that is wrong once in 500 calls is caught."""
    calls = []

    def wrong_once(self, hidden):
        calls.append(hidden)
        return plain(self, hidden + 1 if len(calls) % 500 == 0 else hidden)

    plain = CountingDecoder.compute_logits
    monkeypatch.setattr(CountingDecoder, "compute_logits", wrong_once)
    with hostile() as work, pytest.raises(AssertionError):
        list(map(work.run, range(SLICE)))
