"""A slice of the hostile workloads; `python tests/hostile.py` runs all 10,000."""

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


def test_a_wrong_slot_is_seen(monkeypatch):
    """A model that once reads its neighbour's slot is caught."""
    calls = []

    def stale(self, hidden):
        calls.append(hidden)
        shifted = hidden + 1 if len(calls) == 500 else hidden
        return plain(self, shifted)

    plain = CountingDecoder.logits
    monkeypatch.setattr(CountingDecoder, "logits", stale)
    with pytest.raises(AssertionError), hostile() as work:
        for seed in range(SLICE):
            work.run(seed)
