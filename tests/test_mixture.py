"""Mixtures: the file, who gets which place, and batches out of several sources."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_shards import write_shards

from ant5m.data.mixture import Mixture, Phase, is_mixture
from ant5m.data.mixture_loader import MixtureLoader
from ant5m.data.shards import Shards, Tokens
from ant5m.data.shares import UNIT, make_shares
from ant5m.errors import UserError

LENGTH = 8
SIZES = (29, 5, 64)
"""sequences of the three sources"""
WEIGHTS = (3.0, 1.0, 1.5)

TWO = """
[sources.web]
data = "web"
weight = 3

[sources.books]
data = "../books"
weight = 1
"""


def read(tmp_path, text):
    file = tmp_path / "mixture.toml"
    file.write_text(text)
    return Mixture.read(file)


def test_the_file(tmp_path):
    mixture = read(tmp_path, TWO + "[[phases]]\nfrom = 0.8\nweights = {books = 3.5}\n")
    assert mixture.names == ("web", "books")
    assert mixture.data == (str(tmp_path / "web"), str(tmp_path.parent / "books"))
    assert mixture.phases == (Phase(0.0, (3.0, 1.0)), Phase(0.8, (3.0, 3.5)))
    elsewhere = Mixture.read(tmp_path / "mixture.toml", Path("there"))
    assert elsewhere.data == ("there/web", "books")
    assert Mixture.from_dict(json.loads(json.dumps(mixture.to_dict()))) == mixture
    assert mixture.describe() == [
        "0 to 0.8 of the run: web 75.0%, books 25.0%",
        "0.8 to 1 of the run: web 46.2%, books 53.8%",
    ]


def test_what_no_phase_covers_has_the_weights_of_the_sources(tmp_path):
    phases = "[[phases]]\nfrom=0.6\nto=0.9\nweights={web=0}\n[[phases]]\nfrom=0.1\nto=0.2\nweights={web=1}\n"
    found = read(tmp_path, TWO + phases).phases
    assert [phase.start for phase in found] == [0.0, 0.1, 0.2, 0.6, 0.9]
    assert [phase.weights[0] for phase in found] == [3.0, 1.0, 3.0, 0.0, 3.0]


def test_text_and_the_hub_are_no_paths(tmp_path):
    text = TWO.replace('"web"', '"hf:some/set"').replace('"../books"', '"builtin"')
    assert read(tmp_path, text).data == ("hf:some/set", "builtin")
    assert is_mixture("a/Mixture.TOML") and not is_mixture("hf:a/b.toml") and not is_mixture("a/data")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("weight = 3", "weight = -1", "the weight of web must be a number from 0 on, not -1"),
        ("weight = 3", "weight = nan", "the weight of web must be a number from 0 on, not nan"),
        ("weight = 3", "weight = inf", "the weight of web must be a number from 0 on, not inf"),
        ("weight = 3", "weight = 'much'", "sources[...].weight: expected float, got str"),
        ("weight = 3", "wieght = 3", "sources[...]: object contains unknown field wieght"),
        ("weight = 3", "", "sources[...]: object missing required field weight"),
        ("weight = 3", "weight = 0", "sources.web has weight 0 in the whole run: leave it out"),
        (TWO, "", "object missing required field sources"),
        (TWO, "[sources]", "names no sources"),
        ("[sources.web]", '[sources."a b"]', "sources.'a b': a name has 1 to 40 letters"),
        ("../books", "./web", "two sources have the same data"),
        ("[sources.web]", "[sources.web", "is not valid TOML"),
        ("[sources.web]", "[sources.books]", "is not valid TOML"),
        ("", "[[phases]]\nfrom = 0.5\nweights = {boks = 1}", "a weight for 'boks', which is not a source"),
        ("", "[[phases]]\nfrom = 0.5\nweights = {books = -1}", "the weight of books must be a number from 0"),
        ("", "[[phases]]\nfrom = 0.5\nweights = {web = 0, books = 0}", "all weights are 0"),
        ("", "[[phases]]\nfrom = 1.5\nweights = {}", "phases[0].from: expected float <= 1.0"),
        ("", "[[phases]]\nfrom = 0.5\nto = 0.5\nweights = {}", "from 0.5 to 0.5 is empty"),
        (
            "",
            "[[phases]]\nfrom = 0.5\nweights = {}\n[[phases]]\nfrom = 0.2\nto = 0.6\nweights = {}",
            "phases overlap: one ends at 0.6, the next one starts at 0.5",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(tmp_path, before, after, message):
    text = TWO.replace(before, after) if before else f"{TWO}\n{after}\n"
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "mixture.toml"))
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Mixture.read(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="not valid TOML"):
        Mixture.read(tmp_path / "binary.toml")


def random_shares(draw, sources, phases, steps):
    """Shares over `steps` blocks, weights over four orders of magnitude, some of them 0."""
    block = draw.choice([1, 2, 3, 7, 8, 64, 500])
    spans = []
    for start in sorted([0.0, *(draw.random() for _ in range(phases - 1))]):
        weights = [draw.choice([0, 1, 1, 1]) * 10 ** draw.uniform(-3, 1) for _ in range(sources)]
        spans.append((start, weights if any(weights) else [1.0] * sources))
    return make_shares(spans, block * steps, block)


@pytest.mark.parametrize("phases", [1, 3])
@pytest.mark.parametrize("sources", [1, 2, 3, 8, 20])
def test_every_block_and_the_whole_run_hold_the_shares(sources, phases):
    """A block within one sequence; the run so far within one, with phases within two."""
    draw = random.Random(sources + phases)
    for _ in range(4 + 16 // sources):
        shares = random_shares(draw, sources, phases, 150)
        taken = [0] * sources
        for _ in range(150):
            before = shares.asked(sum(taken))
            counts = np.bincount(shares.deal(taken), minlength=sources).tolist()
            taken = [t + count for t, count in zip(taken, counts, strict=True)]
            after = shares.asked(sum(taken))
            for count, a, b, t in zip(counts, before, after, taken, strict=True):
                assert abs(count * UNIT - (b - a)) < UNIT
                assert abs(t * UNIT - b) < UNIT * (1 if phases == 1 else 2)


def test_asked_is_exact_across_phases():
    shares = make_shares([(0.0, [1, 3]), (0.5, [1, 1]), (0.9, [0, 1])], total=1_000, block=10)
    assert shares.planned(500) == [125, 375]
    assert shares.planned(900) == [325, 575]
    assert shares.planned(1_000) == [325, 675]
    assert shares.planned(1_100) == [325, 775]  # behind its end a run stays in its last phase
    assert all(sum(weights) == UNIT for weights in make_shares([(0, [1, 1, 1])], 9, 3).weights)
    short = make_shares([(0.0, [1, 1]), (0.1, [0, 1]), (0.9, [1, 0])], total=2, block=1)
    assert (short.starts, short.planned(2)) == ((0,), [0, 2])  # one phase has a place in it


def test_a_block_spreads_each_source_over_its_places():
    sources = make_shares([(0, [1, 1, 2])], 100, 16).deal([0, 0, 0])
    assert all((np.bincount(sources[i : i + 4], minlength=3) == [1, 1, 2]).all() for i in range(0, 16, 4))


@pytest.fixture
def sources(tmp_path):
    """Tokens of source k are 1,000 k and their own positions; the second one is less than a batch."""
    found = []
    for number, size in enumerate(SIZES):
        tokens = 1_000 * number + np.arange(size * LENGTH + 1 + number)
        write_shards(tmp_path / str(number), np.split(tokens, [13]))
        found.append(Shards.open(tmp_path / str(number)))
    return found


def make(sources, batch_size, seed=0, block=None, phases=((0.0, WEIGHTS),), total=600, **more):
    shares = make_shares(phases, total, block or batch_size * more.get("world_size", 1))
    joined = Shards.join(sources)
    return MixtureLoader(sources, joined, shares, batch_size, LENGTH, seed, **more)


def rows(loader, batches):
    """(source, number in it) of the next batches' rows, after checking each against its position."""
    found = []
    for _ in range(batches):
        input_ids, targets = loader.next()
        first = input_ids[:, :1]
        assert (input_ids == first + torch.arange(LENGTH)).all() and (targets == input_ids + 1).all()
        source, place = np.divmod(first[:, 0].numpy(), 1_000)
        assert not (place % LENGTH).any()
        found += zip(source.tolist(), (place // LENGTH).tolist(), strict=True)
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 10, 77])
def test_shares_of_every_batch_and_every_sequence_once_an_epoch(sources, batch_size):
    loader = make(sources, batch_size)
    batches = [rows(loader, 1) for _ in range(600 // batch_size)]
    for batch in batches:
        for source, weight in enumerate(WEIGHTS):
            count = sum(row[0] == source for row in batch)
            assert abs(count - batch_size * weight / sum(WEIGHTS)) < 1
    taken = [0] * 3
    for source, size in enumerate(SIZES):
        numbers = [number for batch in batches for s, number in batch if s == source]
        taken[source] = len(numbers)
        epochs = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        assert len(epochs) > 2
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
            if len(epoch) == size:
                assert sorted(epoch) == list(range(size))
        assert epochs[0] != epochs[1]
    assert loader.taken == taken


def test_the_order_hangs_on_the_seed_and_the_source(sources):
    assert rows(make(sources, 6), 50) == rows(make(sources, 6), 50)
    assert rows(make(sources, 6), 50) != rows(make(sources, 6, seed=1), 50)
    twins = make([sources[0], sources[0]], 2, phases=((0.0, (1, 1)),))
    pairs = [twins.next()[0][:, 0].tolist() for _ in range(29)]
    assert sum(a == b for a, b in pairs) < 10


def test_ranks_share_each_batch(sources):
    whole = make(sources, 6)
    ranks = [make(sources, 2, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(60):
        assert rows(whole, 1) == [row for rank in ranks for row in rows(rank, 1)]
        assert [rank.state_dict() for rank in ranks] == [whole.state_dict()] * 3


PHASES = ((0.0, WEIGHTS), (0.4, (0.0, 1.0, 1.0)), (0.7, (1.0, 0.0, 9.0)))


@pytest.mark.parametrize("taken", [0, 1, 37, 38, 42, 70])
def test_resume_is_exact_and_may_change_the_batch_and_the_ranks(sources, taken):
    loader = make(sources, 6, phases=PHASES)
    rows(loader, taken)
    state = json.loads(json.dumps(loader.state_dict()))
    following = rows(loader, 24)
    same = make(sources, 6, phases=PHASES)
    same.load_state_dict(state)
    assert rows(same, 24) == following
    assert same.state_dict() == loader.state_dict() and same.taken == loader.taken
    for batch_size in (1, 4, 9, 48, 144):
        other = make(sources, batch_size, phases=PHASES)
        other.load_state_dict(state)
        assert rows(other, 144 // batch_size) == following
        assert other.state_dict() == loader.state_dict() and other.taken == loader.taken
    ranks = [make(sources, 6, phases=PHASES, rank=rank, world_size=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [row for _ in range(6) for rank in ranks for row in rows(rank, 1)] == following
    assert [rank.state_dict() for rank in ranks] == [loader.state_dict()] * 4


def test_phases_that_the_clock_begins(sources):
    """From the next block on, once; a state in between goes on in the same way."""
    phases = ((0.0, (1, 0, 0)), (0.5, (0, 1, 0)), (0.9, (0, 0, 1)))
    loader = make(sources, 6, phases=phases)
    rows(loader, 3)
    state = loader.state_dict()
    loader.reach(250)  # of the first phase still
    assert loader.state_dict() == state
    loader.reach(400)
    assert loader.state_dict()["starts"] == [0, 18, 540]
    rows(loader, 2)
    assert loader.taken == [18, 12, 0]
    other = make(sources, 4, phases=phases)
    other.load_state_dict(loader.state_dict())
    rows(other, 1)  # inside a block of 6
    for one in (loader, other):
        one.reach(600)
    assert loader.state_dict()["starts"] == [0, 18, 30] and other.state_dict()["starts"] == [0, 18, 36]
    rows(loader, 1), rows(other, 2)
    assert loader.taken == [18, 12, 6] and other.taken == [18, 18, 2 + 4]


def test_a_stop_inside_a_block(sources):
    loader = make(sources, 6, phases=PHASES)
    everything = rows(loader, 80)
    other = make(sources, 4, phases=PHASES, block=6)
    found = rows(other, 50)
    assert sum(other.state_dict()["taken"]) == 198 < other.state_dict()["position"] == 200
    assert other.taken == [sum(row[0] == source for row in found) for source in range(3)]
    resumed = make(sources, 5, phases=PHASES)
    resumed.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert found + rows(resumed, 56) == everything


def test_states_of_other_mixtures_are_refused(sources):
    loader = make(sources, 6)
    rows(loader, 3)
    state = loader.state_dict()
    changes = (
        {"taken": [0, 0, 0]},
        {"taken": [1, 2]},
        {"taken": 3},
        {"block": 0},
        {"block": "6"},
        {"position": -1},
        {"starts": [0, 5]},
        {"starts": ["0"]},
    )
    for change in changes:
        with pytest.raises(UserError, match="damaged"):
            make(sources, 6).load_state_dict({**state, **change})
    single = {name: value for name, value in state.items() if name not in ("taken", "block")}
    with pytest.raises(UserError, match="damaged"):
        make(sources, 6).load_state_dict(single)
    for other in (make(sources, 6, phases=PHASES), make(sources[::-1], 6)):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="seed 0, not 1"):
        make(sources, 6, seed=1).load_state_dict(state)


def test_sources_that_cannot_be_mixed(sources, tmp_path):
    write_shards(tmp_path / "short", [np.arange(LENGTH)])
    short = Shards.open(tmp_path / "short")
    with pytest.raises(UserError, match="short has 8 tokens, too few for one sequence of 8"):
        make([sources[0], short], 2, phases=((0.0, (1, 1)),))
    other = Shards.open(tmp_path / "1")
    other.meta["tokenizer_fingerprint"] = "0" * 64
    with pytest.raises(UserError, match="packed with another tokenizer"):
        make([sources[0], other], 2)


def test_joined_splits_count_everything(sources):
    joined = Shards.join(sources)
    assert joined.num_tokens == sum(source.num_tokens for source in sources)
    for name in ("documents", "tokens", "bytes", "words"):
        assert joined.counts[name] == sum(source.counts[name] for source in sources)
    assert joined.fingerprint not in {source.fingerprint for source in sources}
    assert str(joined.folder).split(" + ") == [str(source.folder) for source in sources]
    assert joined.tokens[SIZES[0] * LENGTH + 1 :][0] == 1_000


def test_masks_are_joined():
    """Where only one of the sources is a conversation."""
    plain, asked = np.arange(11, dtype="<u2"), np.arange(20, 30, dtype="<u2")
    joined = Tokens.join([Tokens([plain]), Tokens([asked], [np.array([0b10110001, 0b10], np.uint8)])])
    assert joined.counted(0, 21).tolist() == [True] * 11 + [c == "1" for c in "1000110101"]
    assert not Tokens.join([Tokens([plain]), Tokens([plain])]).masked
