from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medclr import keys
from medclr.errors import ConfigError
from medclr.models import NegativeQueue

WIDTH = 3
NAMES = (keys.SAMPLE, keys.PATIENT, "view", "age")


def queue_of(size: int = 7) -> NegativeQueue:
    return NegativeQueue(size, WIDTH, NAMES)


def batch_of(first: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Keys that can be told by their patients, ``first`` and those after."""
    number = torch.arange(first, first + count)
    embeddings = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(first)) * 5
    return embeddings, {keys.SAMPLE: number, keys.PATIENT: number, "view": torch.ones_like(number), "age": number / 2}


def enqueue(queue: NegativeQueue, *batches: tuple[int, int]) -> None:
    queue.before_step()
    for batch in batches:
        queue.stash(*batch_of(*batch))
    queue.after_step()


def patients(queue: NegativeQueue) -> list[int]:
    return queue.contents()[1][keys.PATIENT].tolist()


def test_the_oldest_keys_leave_first_also_where_the_queue_begins_again() -> None:
    queue, history = queue_of(7), []
    for first in range(0, 18, 3):
        enqueue(queue, (first, 3))
        history += range(first, first + 3)
        assert sorted(patients(queue)) == history[-7:]
        assert int(queue.filled) == min(7, len(history))
        assert int(queue.pointer) == len(history) % 7
    expected = normalize(torch.cat([batch_of(first, 3)[0] for first in range(0, 18, 3)]), dim=1)
    found, meta = queue.contents()
    torch.testing.assert_close(found, expected[meta[keys.PATIENT]])
    assert torch.equal(meta["age"], meta[keys.PATIENT] / 2)


def test_a_new_queue_is_empty_and_says_so() -> None:
    queue = queue_of(4)
    found, meta = queue.contents()
    assert found.shape == (0, WIDTH)
    assert {name: len(value) for name, value in meta.items()} == dict.fromkeys(NAMES, 0)
    assert queue.meta_patient.tolist() == [-1] * 4
    assert queue.meta_age.isnan().all()


def test_keys_join_at_the_end_of_the_step_those_of_all_micro_batches_in_order() -> None:
    queue = queue_of()
    queue.before_step()
    queue.stash(*batch_of(0, 2))
    queue.stash(*batch_of(2, 2))
    assert patients(queue) == []
    queue.after_step()
    assert patients(queue) == [0, 1, 2, 3]
    queue.after_step()
    assert patients(queue) == [0, 1, 2, 3], "each once"


def test_the_keys_of_a_skipped_step_are_discarded() -> None:
    queue = queue_of()
    queue.before_step()
    queue.stash(*batch_of(0, 2))  # and no after_step
    enqueue(queue, (2, 2))
    assert patients(queue) == [2, 3]


def test_nothing_joins_in_evaluation() -> None:
    queue = queue_of().eval()
    enqueue(queue, (0, 2))
    assert patients(queue) == []


def test_a_queued_key_is_of_no_sample_but_of_a_patient() -> None:
    queue = queue_of()
    enqueue(queue, (3, 2))
    assert queue.contents()[1][keys.SAMPLE].tolist() == [-1, -1]
    assert patients(queue) == [3, 4]


def test_what_is_stashed_has_no_gradient_and_unit_length() -> None:
    queue = queue_of()
    embeddings, meta = batch_of(0, 2)
    queue.stash(embeddings.to(torch.bfloat16).requires_grad_(), meta)
    queue.after_step()
    found, _ = queue.contents()
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_the_queue_travels_in_the_state_dict() -> None:
    queue, other = queue_of(), queue_of()
    for first in (0, 3, 6):
        enqueue(queue, (first, 3))
    other.load_state_dict(queue.state_dict())
    enqueue(queue, (9, 3))
    enqueue(other, (9, 3))
    assert patients(other) == patients(queue)
    assert torch.equal(other.contents()[0], queue.contents()[0])


def test_a_queue_smaller_than_a_batch_is_refused() -> None:
    queue = queue_of(3)
    enqueue(queue, (0, 3))
    with pytest.raises(ConfigError, match="smaller than a batch") as refused:
        queue.stash(*batch_of(0, 4))
    assert "queue_size" in refused.value.fix


@pytest.mark.parametrize(("size", "width"), [(0, 3), (-1, 3), (2.5, 3), (4, 0)])
def test_unusable_sizes_are_refused(size: int, width: int) -> None:
    with pytest.raises(ConfigError, match="queue"):
        NegativeQueue(size, width)
