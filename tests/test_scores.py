"""Scores in tasks and exports at word budgets, while a model is trained."""

import dataclasses
import json
import math
import re

import pytest
import torch
from test_train import config, material, of_kind  # noqa: F401  (fixtures)

from ant5m.data.shards import Shards
from ant5m.errors import UserError
from ant5m.eval.tasks import TaskSubset, evaluate_tasks
from ant5m.model.checkpoint import latest_checkpoint, load
from ant5m.ranks import Ranks
from ant5m.train import pretrain
from ant5m.train.scores import SHARE, ScoreTasks
from ant5m.train.word_budgets import parse_words

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    piqa = [
        {"goal": "the ant", "sol1": " ".join(["leaf"] * (1 + i % 3)), "sol2": "home", "label": i % 2}
        for i in range(12)
    ]
    sums = [{"ctx": f"{i} =", "endings": [f" {i + j}" for j in range(4)], "label": i % 4} for i in range(9)]
    for name, rows in (("piqa", piqa), ("arithmark-3", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scored(config, items, **more):  # noqa: F811
    return dataclasses.replace(config, eval_tasks=("piqa", "ArithMark-3.0"), eval_data_dir=items, **more)


@pytest.mark.filterwarnings("ignore:.*scores do not compare")
def test_scores_are_logged_and_change_nothing(config, items, tmp_path):  # noqa: F811
    plain = pretrain(dataclasses.replace(config, out=tmp_path / "plain")).run
    run = pretrain(scored(config, items, eval_tasks_every=3, eval_items=1_000)).run
    lines = of_kind(run, "tasks")
    assert [line["step"] for line in lines] == [3, 6, 8]
    weights = [load(latest_checkpoint(folder))[0].state_dict() for folder in (plain, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    net, tokenizer = load(run)
    names = ["piqa", "ArithMark-3.0"]
    known = {one.task: one.metrics["acc_norm"][0] for one in evaluate_tasks(net, tokenizer, names, items)}
    assert {name: lines[-1][name] for name in names} == known
    assert (run / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "tasks.png" in (run / "report.md").read_text()
    assert not (plain / "tasks.png").exists()


@pytest.mark.filterwarnings("ignore:.*scores do not compare")
def test_the_part_is_fixed_and_fewer_items_are_its_beginning(config, items):  # noqa: F811
    net, tokenizer = load(pretrain(config).run)

    def order(count):
        subset = TaskSubset(net, tokenizer, ["piqa"], items, count)
        (part,) = subset._parts["piqa"]
        return [one.doc["sol1"] + one.doc["goal"] for one in part.first(count, subset._lm.tokens)]

    assert order(5) == order(5)
    whole, grown = (TaskSubset(net, tokenizer, ["piqa", "ArithMark-3.0"], items, 9) for _ in range(2))
    few = grown.score(4)  # and then more of them
    (part,) = whole._parts["piqa"]
    right = [one.accuracy(iter(whole._lm.ask(one.requests))) for one in part.first(9, whole._lm.tokens)]
    assert few["piqa"] == sum(right[:4]) / 4
    assert grown.score() == whole.score() and whole.score()["piqa"] == pytest.approx(sum(right) / 9)


class Clock:
    """Seconds that go by only where something is said to take them."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def simulate(monkeypatch, capsys, steps, each, loading=0.0, slower_at=None, speed=None, **given):
    """The share of a run's time that scores take, and the steps at which they are taken; half a second a
    step."""
    clock = Clock(monkeypatch)

    class Subset:
        items = given.get("items") or 2_000

        def __init__(self, *args):
            clock.now += loading
            self.asked = 0

        def score(self, count):
            clock.now += each * count * (3 if slower_at and trainer.step >= slower_at else 1)
            clock.now += 0.2 * each * max(0, count - self.asked)
            self.asked = max(count, self.asked)
            return {}

    class Trainer:
        step = position = 0
        seconds = since = 0.0
        ranks, settings, complete = Ranks(), dataclasses.make_dataclass("Settings", ["steps"])(steps), False
        waited = property(lambda self: clock.now - self.since)
        log = lambda self, *args, **values: taken.append(self.step)  # noqa: E731

        def add(self):
            self.seconds, self.since = self.seconds + clock.now - self.since, clock.now

    monkeypatch.setattr("ant5m.eval.tasks.TaskSubset", Subset)
    taken, trainer = [], Trainer()
    scores = ScoreTasks(None, None, (), None, given.get("items"), given.get("every"), steps)
    trainer.since = clock.now
    for trainer.step in range(1, steps):
        clock.now += speed(trainer.step) if speed else 0.5
        trainer.add()
        if scores.is_due(trainer.step):
            clock.now += 0.1  # the check of the model
            scores.act(trainer)
            trainer.add()
    trainer.step, trainer.complete = steps, True
    scores.on_end(trainer)
    work = sum(speed(step) for step in range(1, steps)) if speed else 0.5 * steps
    return (clock.now - work) / work, taken, capsys.readouterr().err


@pytest.mark.parametrize("each", [1e-5, 1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("loading", [0.0, 3.0])
def test_all_of_it_takes_at_most_its_share(each, loading, monkeypatch, capsys):
    share, taken, text = simulate(monkeypatch, capsys, 1_000, each, loading)
    assert share <= SHARE and taken[0] == 20 and taken[-1] == 1_000 and len(taken) >= 4
    assert f"scores: {len(taken)} of " in text
    slower, _, _ = simulate(monkeypatch, capsys, 1_000, each, loading, slower_at=500)
    assert slower <= SHARE
    for speed in (lambda step: 1.0 if step < 40 else 0.5, lambda step: 0.5 if step < 500 else 1.0):
        share, taken, _ = simulate(monkeypatch, capsys, 1_000, each, loading, speed=speed)
        assert share <= SHARE and len(taken) > 2


def test_where_one_score_takes_more_only_the_end_is_scored(monkeypatch, capsys):
    with pytest.warns(
        UserWarning, match=r"scores take 2\.\d% of this run even when only its end is scored, 100"
    ):
        share, taken, _ = simulate(monkeypatch, capsys, 100, 8e-3)
    assert taken == [100] and share < 0.03
    share, taken, _ = simulate(monkeypatch, capsys, 1_000, 1e-3, items=1_500, every=400)
    assert taken == [400, 800, 1_000]  # what is given is done


def test_a_resumed_run_knows_what_was_spent():
    first, second = (ScoreTasks.__new__(ScoreTasks) for _ in range(2))
    first._items, first._next, first._planned, first._seconds, first._spent, first._count = (
        9,
        7,
        True,
        0.5,
        2.0,
        3,
    )
    second._spent = 1.0
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {**first.state_dict(), "spent": 3.0}


def test_tasks_without_an_accuracy_are_refused(config, items):  # noqa: F811
    for task in ("wikitext", "glint"):
        with pytest.raises(UserError, match="wikitext has no accuracy"):
            pretrain(dataclasses.replace(config, eval_tasks=(task,), eval_data_dir=items))


def test_exports_at_word_budgets(config):  # noqa: F811
    run = pretrain(dataclasses.replace(config, steps=60, checkpoint_words=("1K", "2K", "900K"))).run
    assert sorted(path.name for path in (run / "babylm").iterdir()) == ["chck_1K", "chck_2K"]
    tokens = {}
    for name in ("chck_1K", "chck_2K"):
        assert load(run / "babylm" / name)[0].config == load(run)[0].config
        tokens[name] = re.search(r"on ([\d,]+) tokens of", (run / "babylm" / name / "README.md").read_text())[
            1
        ]
    steps = {name: int(count.replace(",", "")) / 128 for name, count in tokens.items()}
    counts = Shards.open(config.data[0]).counts
    per_step = 128 * counts["words"] / counts["tokens"]
    assert steps == {"chck_1K": math.ceil(1_000 / per_step), "chck_2K": math.ceil(2_000 / per_step)}


def test_mistakes(config, items):  # noqa: F811
    assert parse_words("10M") == 10_000_000
    for wrong in ("1m", "0M", "M", "1.5M", "10"):
        with pytest.raises(UserError, match="--checkpoint-words takes"):
            parse_words(wrong)
    with pytest.raises(UserError, match="there is no task 'nope'"):
        pretrain(dataclasses.replace(config, eval_tasks=("nope",)))
    with pytest.raises(UserError, match="boolq"):
        pretrain(dataclasses.replace(config, eval_tasks=("boolq",), eval_data_dir=items))
    assert not config.out.exists()
