import json

import numpy as np
import pytest
import torch
from test_shards import write_shards

from ant5m.data import order
from ant5m.data.loader import Loader, sequences
from ant5m.data.shards import Shards
from ant5m.errors import UserError

LENGTH = 8


@pytest.fixture
def shards(tmp_path):
    """29 sequences of 8 and a rest of 5 in three files; the tokens are their own positions."""
    everything = np.arange(29 * LENGTH + 1 + 5)
    write_shards(tmp_path / "data", np.split(everything, [30, 101]))
    return Shards.open(tmp_path / "data")


def starts(loader, batches):
    """Sequence numbers of the next batches, after checking every row against its position."""
    found = []
    for _ in range(batches):
        input_ids, targets = loader.next()
        assert input_ids.dtype == targets.dtype == torch.int64
        assert input_ids.shape == targets.shape == (loader.batch_size, LENGTH)
        first = input_ids[:, :1]
        assert torch.equal(input_ids, first + torch.arange(LENGTH))
        assert torch.equal(targets, input_ids + 1)
        assert not (first % LENGTH).any()
        found += (first[:, 0] // LENGTH).tolist()
    return found


def test_every_sequence_once_an_epoch_in_a_new_order(shards):
    loader = Loader(shards, batch_size=1, sequence_length=LENGTH, seed=3)
    assert loader.num_sequences == 29
    epochs = []
    for epoch in range(3):
        assert loader.epoch == epoch
        epochs.append(starts(loader, 29))
        assert sorted(epochs[-1]) == list(range(29))
        assert epochs[-1] != sorted(epochs[-1])
    assert epochs[0] != epochs[1] != epochs[2]
    assert starts(Loader(shards, 1, LENGTH, seed=3), 29) == epochs[0]
    assert starts(Loader(shards, 1, LENGTH, seed=4), 29) != epochs[0]


def test_batches_run_over_the_end_of_an_epoch(shards):
    one_by_one = starts(Loader(shards, 1, LENGTH, seed=0), 29 * 3)
    assert starts(Loader(shards, 6, LENGTH, seed=0), 14) == one_by_one[: 6 * 14]
    assert starts(Loader(shards, 80, LENGTH, seed=0), 1) == one_by_one[:80]  # three epochs in one batch


def test_ranks_share_each_step(shards):
    whole = Loader(shards, 6, LENGTH, seed=0)
    ranks = [Loader(shards, 2, LENGTH, seed=0, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(12):
        assert starts(whole, 1) == [number for rank in ranks for number in starts(rank, 1)]
        assert {rank.epoch for rank in ranks} == {whole.epoch}


def test_resume_is_exact_and_may_change_the_batch(shards):
    loader = Loader(shards, 6, LENGTH, seed=0)
    for _ in range(7):  # into the second epoch
        loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    following = starts(loader, 6)
    resumed = Loader(shards, 6, LENGTH, seed=0)
    resumed.load_state_dict(state)
    assert resumed.epoch == 1
    assert starts(resumed, 6) == following
    assert resumed.state_dict() == loader.state_dict()
    other = Loader(shards, 3, LENGTH, seed=0)
    other.load_state_dict(state)
    assert starts(other, 12) == following


def test_a_run_keeps_the_kind_of_order_that_it_began_with(shards, monkeypatch):
    state = Loader(shards, 6, LENGTH, seed=0).state_dict()
    assert state.pop("order") == "permutation"  # states of ant5m 0.1.0 do not name it
    expected = starts(Loader(shards, 6, LENGTH, seed=0), 10)
    monkeypatch.setattr(order, "LARGEST_PERMUTATION", 28)
    loader = Loader(shards, 6, LENGTH, seed=0)
    following = starts(loader, 5)
    assert loader.state_dict()["order"] == "feistel"
    assert sorted(following[:29]) == list(range(29))
    assert following != expected[:30]
    loader.load_state_dict(state)
    assert starts(loader, 10) == expected
    assert loader.state_dict()["order"] == "permutation"


def test_a_state_of_other_data_or_options_is_refused(shards, tmp_path):
    state = Loader(shards, 2, LENGTH, seed=0).state_dict()
    write_shards(tmp_path / "other", [np.arange(100)])
    with pytest.raises(UserError, match="not those of the checkpoint"):
        Loader(Shards.open(tmp_path / "other"), 2, LENGTH, seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="seed 0, not 1"):
        Loader(shards, 2, LENGTH, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="sequence_length 8, not 4"):
        Loader(shards, 2, 4, seed=0).load_state_dict(state)
    for damaged in ({}, {**state, "position": "far"}, {**state, "position": -1}, {**state, "order": "?"}):
        with pytest.raises(UserError, match="damaged"):
            Loader(shards, 2, LENGTH, seed=0).load_state_dict(damaged)


def test_tokens_too_few_for_a_sequence(tmp_path):
    write_shards(tmp_path / "data", [np.arange(LENGTH)])
    with pytest.raises(UserError, match="8 tokens, too few for one sequence of 8"):
        Loader(Shards.open(tmp_path / "data"), 1, LENGTH, seed=0)
    write_shards(tmp_path / "data", [np.arange(LENGTH + 1)])
    assert starts(Loader(Shards.open(tmp_path / "data"), 1, LENGTH, seed=0), 2) == [0, 0]


@pytest.mark.parametrize(
    ("batch_size", "length", "seed", "rank"), [(0, 8, 0, 0), (1, 0, 0, 0), (1, 8, -1, 0), (1, 8, 0, 2)]
)
def test_impossible_sizes(shards, batch_size, length, seed, rank):
    with pytest.raises(UserError, match="must be above 0"):
        Loader(shards, batch_size, length, seed, rank, world_size=2)


@pytest.mark.parametrize("limit", [None, 1, 8, 20, 24, 236, 237, 10_000])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_scores_tokens_once(shards, batch_size, limit):
    scored = []
    for input_ids, targets in sequences(shards, batch_size, LENGTH, limit_tokens=limit):
        assert input_ids.shape == targets.shape
        assert input_ids.shape[0] <= batch_size
        assert input_ids.shape[1] == LENGTH
        counted = targets != -100
        before = torch.where(targets == 0, shards.eos_token_id, targets - 1)
        assert torch.equal(input_ids[counted], before[counted])  # the first token is behind an end-of-text
        assert (input_ids[~counted] == shards.eos_token_id).all()
        scored += targets[counted].tolist()
    assert len(scored) == len(set(scored)) == min(limit or 238, 238)
    if (limit or 238) > 236:
        assert scored == list(range(len(scored)))


def test_a_part_is_spread_over_the_split(shards):
    (_, targets), *_ = sequences(shards, 100, LENGTH, limit_tokens=4 * LENGTH)
    assert targets[:, 0].tolist() == [0, 9 * LENGTH, 18 * LENGTH, 28 * LENGTH]


def test_evaluation_refuses_nothing(shards, tmp_path):
    with pytest.raises(UserError, match="above 0"):
        next(sequences(shards, 1, LENGTH, limit_tokens=0))
    write_shards(tmp_path / "one", [[5]])
    (_, targets), *_ = sequences(Shards.open(tmp_path / "one"), 1, LENGTH)
    assert targets[0].tolist() == [5] + [-100] * (LENGTH - 1)
