"""The logprob kernels report what their torch twin reports, and that is log_softmax.

On a GPU these tests run compiled; elsewhere they run in Triton's interpreter, which must be asked
for before Triton is first imported: TRITON_INTERPRET=1 pytest tests/gpu/test_logprobs_kernels.py.
"""

import os

import pytest
import torch

from nanovllm.layers import logprobs as twin
from nanovllm.logprobs import IDS, LOGPROBS, NO_ID, NONE, RANK

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from nanovllm.kernels import logprobs as kernels  # noqa: E402  (not every machine has Triton)

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
VOCABULARIES = [5, 300, 9000, 49_152, 151_936] if CUDA else [5, 300, 9000]
ROWS = 64 if CUDA else 7
LOGITS = {
    "random": lambda *shape: torch.randn(shape),
    "flat": lambda *shape: torch.full(shape, 1.5),
    "peaked": lambda *shape: 8 * torch.randn(shape),
    "tied": lambda *shape: (2 * torch.randn(shape)).round(),
    "far": lambda *shape: 1000 * torch.randn(shape),
    "half forbidden": lambda *shape: torch.where(
        torch.rand(shape) < 0.5, -torch.inf, torch.randn(shape)
    ),
}

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def read(packed, row, number):
    """One packed row's rank, ids and log probabilities."""
    values = packed[row, LOGPROBS : LOGPROBS + 1 + number].contiguous().view(torch.float32)
    return int(packed[row, RANK]), packed[row, IDS : IDS + 1 + number].tolist(), values.cpu()


def assert_same(found, wanted, numbers):
    for row, number in enumerate(numbers):
        if number != NONE:
            rank, ids, values = read(found, row, number)
            wanted_rank, wanted_ids, wanted_values = read(wanted, row, number)
            assert (rank, ids) == (wanted_rank, wanted_ids), row
            there = torch.tensor(ids) != NO_ID
            torch.testing.assert_close(
                values[there], wanted_values[there], atol=2e-5, rtol=1e-5, equal_nan=True
            )


def asked(rows):
    """Each row's number of logprobs: all from none to twenty."""
    numbers = [(NONE, 0, 1, 5, 20, 3, 11)[row % 7] for row in range(rows)]
    return numbers, torch.tensor(numbers, dtype=torch.int32, device=DEVICE)[:, None]


@pytest.mark.parametrize("kind", LOGITS)
def test_the_kernels_report_what_torch_reports(kind, dtype):
    for vocab_size in VOCABULARIES:
        logits = LOGITS[kind](ROWS, vocab_size).to(DEVICE, dtype)
        token_ids = torch.randint(vocab_size, (ROWS,), device=DEVICE)
        numbers, column = asked(ROWS)
        found = kernels.gather_logprobs(logits, token_ids, column)
        assert_same(found, twin.gather_logprobs(logits, token_ids, column), numbers)


def test_the_numbers_may_be_a_column_of_a_table(dtype):
    logits = torch.randn(ROWS, 300).to(DEVICE, dtype)
    token_ids = torch.randint(300, (ROWS,), device=DEVICE)
    numbers, column = asked(ROWS)
    table = torch.zeros(ROWS, 9, dtype=torch.int32, device=DEVICE)
    table[:, 2:3] = column
    found = kernels.gather_logprobs(logits, token_ids, table[:, 2:3])
    assert_same(found, twin.gather_logprobs(logits, token_ids, column), numbers)


def test_the_twin_is_log_softmax_and_a_stable_sort(dtype):
    """The rank counts all tokens that are as likely; of equal ones the lowest ids come first."""
    logits = torch.cat((torch.randn(3, 4000), (2 * torch.randn(3, 4000)).round())).to(DEVICE, dtype)
    token_ids = torch.randint(4000, (6,), device=DEVICE)
    column = torch.full((6, 1), 20, dtype=torch.int32, device=DEVICE)
    values = logits.float().log_softmax(dim=1)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :20]
    for gather in (twin.gather_logprobs, kernels.gather_logprobs):
        packed = gather(logits, token_ids, column)
        for row, token_id in enumerate(token_ids.tolist()):
            rank, ids, logprobs = read(packed, row, 20)
            assert ids == [token_id, *order[row].tolist()]
            torch.testing.assert_close(logprobs, values[row, ids].cpu(), atol=1e-5, rtol=0)
            assert rank == int((logits[row] >= logits[row, token_id]).sum())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_bad_logit_stays_in_its_row(bad, dtype):
    """Its row's probabilities are NaN, and its ids are ids all the same. A row may have no id."""
    logits = torch.randn(3, 5000).to(DEVICE, dtype)
    logits[1, 4999] = bad
    token_ids = torch.tensor([7, -1, 9], device=DEVICE)
    column = torch.full((3, 1), 4, dtype=torch.int32, device=DEVICE)
    found = kernels.gather_logprobs(logits, token_ids, column)
    wanted = twin.gather_logprobs(logits, token_ids, column)
    assert_same(found, wanted, [4, NONE, 4])
    for packed in (found, wanted):
        _, ids, values = read(packed, 1, 4)
        assert ids[:2] == [0, 4999]
        assert all(0 <= token_id < 5000 for token_id in ids)
        assert values.isnan().any()
