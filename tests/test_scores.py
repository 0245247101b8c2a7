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
def test_the_part_is_fixed(config, items):  # noqa: F811
    _, tokenizer = load(pretrain(config).run)
    subsets = [TaskSubset(tokenizer, ["piqa"], items, 5) for _ in range(2)]
    drawn = [subset._tasks["piqa"][0][1] for subset in subsets]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 5


def test_the_first_scores_decide_how_often(monkeypatch):
    class Trainer:
        step, seconds = 20, 10.0  # half a second a step
        ranks = Ranks()

    def first(seconds):
        scores = ScoreTasks.__new__(ScoreTasks)
        scores._every, scores._first, scores._steps = None, 20, 1_000
        monkeypatch.setattr(scores, "_score", lambda trainer: seconds)
        assert not scores.is_due(19) and scores.is_due(20)
        scores.act(Trainer())
        return scores

    for seconds in (0.001, 0.3, 2.0, 3.0, 5.0):
        scores = first(seconds)
        steps = {20, 1_000} | {step for step in range(21, 1_001) if scores.is_due(step)}
        assert len(steps) * seconds <= SHARE * 500  # of the whole run
    assert scores._every == 1_000
    with pytest.warns(UserWarning, match=r"scores take 6.0 s, 2% of this run"):
        first(6.0)
    scores = first(3.0)
    assert scores._every == 500
    other = ScoreTasks.__new__(ScoreTasks)
    other.load_state_dict(scores.state_dict())
    assert other._every == 500


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
