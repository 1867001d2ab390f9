"""The small decoder that lesson 07's exercises capture."""

import torch

from course.labs.recording import Recording
from course.models.toy_decoder import ToyDecoder

CPU = torch.device("cpu")


def test_a_row_of_position_minus_one_stores_nothing_and_disturbs_nobody():
    alone, padded = ToyDecoder(3), ToyDecoder(3)
    ids, wider = torch.tensor([5, 9]), torch.tensor([5, 9, 1])
    for position in range(4):
        at = torch.tensor([position, position])
        answer, with_padding = alone(ids, at), padded(wider, torch.tensor([position, position, -1]))
        assert answer.tolist() == with_padding[:2].tolist()
        ids, wider = answer, with_padding
    assert not padded.stored[:, 2].any()
    assert torch.equal(alone.stored, padded.stored)


def test_what_it_answers_depends_on_the_context():
    model = ToyDecoder(1)
    first = model(torch.tensor([5]), torch.tensor([0]))
    answers = {tuple(model(torch.tensor([5]), torch.tensor([i])).tolist()) for i in range(1, 12)}
    for begin in range(8):
        model(torch.tensor([begin]), torch.tensor([0]))
        answers |= {tuple(model(torch.tensor([5]), torch.tensor([1])).tolist())}
    assert len(answers | {tuple(first.tolist())}) > 1


def test_it_can_be_captured():
    model = ToyDecoder(2)
    ids, positions = torch.tensor([4, 8]), torch.tensor([0, 0])
    recording = Recording(lambda: model(ids, positions), CPU)
    assert model.calls == 2
    ids.copy_(torch.tensor([30, 31]))
    recording.replay()
    assert recording.result.tolist() == ToyDecoder(2)(ids, positions).tolist()
    assert model.calls == 2
