"""The 0-shot table: lm-eval's own figures, kept, shown and continued."""

import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from msgspec import Struct
from rich.console import Console
from tokenizers import models, processors

from ant5m.cli import call
from ant5m.cli.evaluate import _task_table
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval import results, tasks
from ant5m.eval.benchmarks import BENCHMARKS
from ant5m.eval.items import choose_files, find_files, read_rows
from ant5m.eval.results import TaskResult, parts, rows
from ant5m.eval.tasks import evaluate_tasks, known_tasks, lm_eval_tasks
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.files import file_sha256, read_json, write_json
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import FORMAT, VERSION, load
from ant5m.model.config import ModelConfig
from ant5m.model.weights import save_model

lm_eval = pytest.importorskip("lm_eval")

SENTENCE = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
WORDS = SENTENCE.split()
CONTEXT = 64
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,
)
OTHERS = (
    "boolq",
    "copa",
    "winogrande",
    "truthfulqa_mc2",
    "openbookqa",
    "arc_challenge",
    "swag",
    "race",
    "sciq",
)
TASKS = ("blimp", "piqa", "arc_easy", "hellaswag", "lambada_openai", "wikitext", *OTHERS, "commonsense_qa")
"""what the fast path is compared with lm-eval in: all but MMLU, whose 57 parts are for `--long`"""
SETTINGS = {"limit": None, "data": "x", "sha256": None, "lm_eval": "1"}


def said(seed: int, low: int = 3, high: int = 12) -> str:
    """A text of words, the same for a seed."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, random.integers(low, high)))


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20, vocab_size=300)


@pytest.fixture(scope="module")
def net(tokenizer) -> Ant:
    torch.manual_seed(0)
    return Ant(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(net, tokenizer, tmp_path_factory):
    """The model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("tasks") / "hf"
    export(net, tokenizer, path, ModelCard("tiny"))
    return path


@pytest.fixture
def run(net, tokenizer, folder, tmp_path):
    """The model as a finished run."""
    path = tmp_path / "run"
    checkpoint = path / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    save_model(net, checkpoint)
    state = {"format": FORMAT, "version": VERSION, "step": 7, "tokens": 900, "model": CONFIG.to_dict()}
    state["files"] = {"model.safetensors": file_sha256(checkpoint / "model.safetensors")}
    write_json(checkpoint / "state.json", state)
    write_json(path / "config.json", {"train": {}})
    tokenizer.save(path / "tokenizer")
    shutil.copytree(folder, path / "hf")
    (path / "report.md").write_text("# run\n\n## Result\nnone\n\n## Samples\nnone\n")
    return path


def other_items() -> dict[str, list]:
    """Four items for each task of which nothing else is tested."""
    choices = [{"text": [said(i + 9 * j, 1, 5) for j in range(4)], "label": list("ABCD")} for i in range(4)]
    lettered = [{"choices": choices[i], "answerKey": "ABCD"[i]} for i in range(4)]
    texts = [[said(i + 20 * j) for j in range(9)] for i in range(4)]
    five = {"text": ["ant", "leaf", "nest", "tree", "path"], "label": list("ABCDE")}
    problems = [{"question": f"{said(1)} _ .", "answer": "B", "options": texts[0][:4]}] * 2
    return {
        "boolq": [{"question": t[0], "passage": t[1], "label": i % 2} for i, t in enumerate(texts)],
        "copa": [
            {"premise": f"{t[0]}.", "choice1": t[1].title(), "choice2": t[2], "question": q, "label": i % 2}
            for i, (t, q) in enumerate(zip(texts, ("cause", "effect") * 2, strict=True))
        ],
        "winogrande": [
            {"sentence": f"{t[0]} _ {t[1]}", "option1": "ant", "option2": "tree", "answer": "12"[i % 2]}
            for i, t in enumerate(texts)
        ],
        "truthfulqa_mc2": [
            {"question": f"{t[0]}?", "mc2_targets": {"choices": t[1:4], "labels": [1, i % 2, 0]}}
            for i, t in enumerate(texts)
        ],
        "openbookqa": [{"question_stem": t[0], **one} for t, one in zip(texts, lettered, strict=True)],
        "arc_challenge": [{"question": f"{t[0]}?", **one} for t, one in zip(texts, lettered, strict=True)],
        "commonsense_qa": [
            {"question": f"{t[0]}?", "choices": five, "answerKey": "ABCE"[i]} for i, t in enumerate(texts)
        ],
        "swag": [
            {"startphrase": t[0], **{f"ending{j}": t[j + 1] for j in range(4)}, "label": i}
            for i, t in enumerate(texts)
        ],
        "race": [{"article": t[0], "problems": str(problems)} for t in texts],
        "sciq": [
            {
                "support": t[0] * (i % 2),
                "question": f"{t[1]}?",
                "correct_answer": t[2],
                **{f"distractor{j}": t[2 + j] for j in (1, 2, 3)},
            }
            for i, t in enumerate(texts)
        ],
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Items of our own for `TASKS` and ArithMark-2.0, in the fields and layouts of the hub."""
    path = tmp_path_factory.mktemp("benchmarks")
    for number, part in enumerate(tasks._parts(BENCHMARKS["blimp"])):
        pairs = [(said(10 * number + i), said(10 * number + i + 5)) for i in range(2)]
        pairs.append((SENTENCE, SENTENCE[:-4] + "ants"))
        fields = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
        write(path / "blimp" / f"{part.removeprefix('blimp_')}.jsonl", fields)
    piqa = [{"goal": said(i), "sol1": said(i + 50), "sol2": said(i + 90), "label": i % 2} for i in range(9)]
    piqa[0]["goal"] += "  "  # spaces that belong to the answer
    piqa[1]["goal"] = said(1, 90, 99)  # longer than the context
    write(path / "piqa" / "piqa_validation.jsonl", piqa)
    arc = [
        {
            "question": f"Which of the ants {said(i)}?",
            "choices": {"text": [said(i + 30 * j, 1, 5) for j in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(9)
    ]
    write(path / "arc" / "arc_easy_test.jsonl", arc)
    hellaswag = [
        {
            "activity_label": "Ants",
            "ctx_a": said(i),
            "ctx_b": said(i + 1),
            "endings": [said(i + 7 * j) for j in range(4)],
            "label": str(i % 4),
        }
        for i in range(9)
    ]
    write(path / "hellaswag_validation.jsonl", hellaswag)
    lambada = [{"text": said(i, 12, 40)} for i in range(9)] + [{"text": said(5, 80, 99)}]
    write(path / "lambada-openai" / "test.jsonl", lambada)
    pages = [{"page": f" = Ants =\n \n {said(i, 100, 300)} , and @-@ {said(i)} .\n"} for i in range(3)]
    pages.append({"page": f"<|endoftext|>{said(4)} ;"})  # a text that spells the special token
    write(path / "wikitext2.jsonl", pages)
    for name, made in other_items().items():
        write(path / f"{name}.jsonl", made)
    sums = [{"ctx": f"{i} + 1 =", "endings": [f" {i + j}" for j in range(4)], "label": 1} for i in range(9)]
    write(path / "ArithMark-2.0" / "train.jsonl", sums)
    return path


def by_task(found: list[TaskResult]) -> dict[str, TaskResult]:
    return {result.task: result for result in found}


@pytest.fixture(scope="module")
def compared(net, tokenizer, folder, data_dir):
    return compare(net, tokenizer, folder, data_dir, TASKS)


def compare(net, tokenizer, folder, data_dir, names):
    """(lm-eval's evaluation with its `hf` model, the same with `ant5m`, ours) of some tasks."""
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    import ant5m.eval.harness  # noqa: F401  (registers the model)

    def evaluate(lm):
        loaded = {"tasks": lm_eval_tasks(names, data_dir), "groups": {}, "group_map": {}}
        return lm_eval.evaluate(lm, loaded, bootstrap_iters=0)

    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    ant = get_model("ant5m").create_from_arg_string(
        f"pretrained={folder}", {"device": "cpu", "batch_size": 1}
    )
    return evaluate(hf), evaluate(ant), by_task(evaluate_tasks(net, tokenizer, names, data_dir))


@pytest.mark.parametrize("name", TASKS)
def test_every_item_scores_as_in_lm_eval(compared, name):
    hf, ant, _ = compared
    named = [task for task in hf["samples"] if task.startswith(name)]
    assert len(named) == (67 if name == "blimp" else 1)
    check_items(hf, ant, named)


def check_items(hf, ant, named):
    for task in named:
        for expected, found in zip(hf["samples"][task], ant["samples"][task], strict=True):
            assert expected["arguments"] == found["arguments"]
            pairs = zip(expected["filtered_resps"], found["filtered_resps"], strict=True)
            for one, other in pairs:
                assert np.shape(one) == np.shape(other)
                assert np.allclose(one, other, rtol=1e-7, atol=1e-4)  # and greedy or not, 1 or 0


@pytest.mark.parametrize("name", TASKS)
def test_every_figure_is_that_of_lm_eval(compared, name):
    from lm_eval.api.metrics import mean_stderr

    hf, _, ours = compared
    for task in (task for task in hf["results"] if task.startswith(name)):
        known = hf["results"][task]
        for metric, (value, error) in ours[task].metrics.items():
            if metric.startswith("acc") and name != "truthfulqa_mc2":  # there a mean of probabilities
                assert value == known[f"{metric},none"]
                assert error == pytest.approx(mean_stderr([item[metric] for item in hf["samples"][task]]))
            elif metric != "token_perplexity":  # which lm-eval has not
                assert value == pytest.approx(known[f"{metric},none"], rel=1e-4)
        assert ours[task].items == len(hf["samples"][task])


@pytest.mark.slow
def test_every_item_of_mmlu_scores_as_in_lm_eval(net, tokenizer, folder, tmp_path):
    subjects = [name.removeprefix("mmlu_") for name in tasks._parts(BENCHMARKS["mmlu"])]
    rows = [
        {
            "question": said(i),
            "subject": name,
            "choices": [said(i + j, 1, 4) for j in range(4)],
            "answer": i % 4,
        }
        for i, name in enumerate(subjects)
    ]
    write(tmp_path / "mmlu_test.jsonl", rows)
    hf, ant, ours = compare(net, tokenizer, folder, tmp_path, ["mmlu"])
    assert len(hf["samples"]) == 57
    check_items(hf, ant, hf["samples"])
    assert ours["mmlu"].metrics["acc"][0] == pytest.approx(
        np.mean([hf["results"][name]["acc,none"] for name in hf["samples"]])
    )


def test_long_sums_are_nearer_to_fp64_than_those_of_lm_eval(net, tokenizer, folder):
    """Both add up log-probabilities in fp32; `hf` keeps the sum in it, too."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ant5m.eval.harness import AntLM

    texts = [(said(i), " " + said(i + 50, 40, 41)) for i in range(40)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]

    def sums(lm):
        return np.array([nats for nats, _ in lm.loglikelihood(requests, disable_tqdm=True)])

    single, exact = (
        sums(HFLM(str(folder), device="cpu", dtype=d, batch_size=8)) for d in ("float32", "float64")
    )
    ours = sums(AntLM(net=net, tokenizer=tokenizer))
    assert exact.max() < -100
    assert np.abs(ours - exact).max() < np.abs(single - exact).max()
    assert np.allclose(ours, exact, rtol=2e-7, atol=1e-5)


def test_blimp_is_the_mean_of_its_parts(compared):
    ours = compared[2]
    inner = [ours[name].metrics["acc"] for name in ours if name.startswith("blimp_")]
    assert len(inner) == 67
    value, error = ours["blimp"].metrics["acc"]
    assert value == pytest.approx(np.mean([part for part, _ in inner]))
    assert error == pytest.approx(np.sqrt(np.sum([part**2 for _, part in inner])) / 67)
    assert ours["blimp"].items == 67 * 3 and ours["blimp"].chance == 0.5


def test_the_perplexities_say_over_what(compared, tokenizer, data_dir):
    wikitext = compared[2]["wikitext"]
    pages = [json.loads(line)["page"] for line in (data_dir / "wikitext2.jsonl").read_text().splitlines()]
    assert wikitext.over["bytes"] == sum(len(page.encode()) for page in pages)
    assert wikitext.over["tokens"] > wikitext.over["words"] > 300
    nats = np.log(wikitext.metrics["token_perplexity"][0]) * wikitext.over["tokens"]
    assert np.exp(nats / wikitext.over["words"]) == pytest.approx(wikitext.metrics["word_perplexity"][0])
    assert nats / np.log(2) / wikitext.over["bytes"] == pytest.approx(wikitext.metrics["bits_per_byte"][0])


def test_arithmark_sums_the_tokens_of_endings_that_are_tokenised_apart(net, tokenizer, data_dir):
    items = [
        json.loads(line) for line in (data_dir / "ArithMark-2.0" / "train.jsonl").read_text().splitlines()
    ]
    right = 0
    for item in items:
        sums = []
        for ending in item["endings"]:
            context, answer = tokenizer.encode(item["ctx"]), tokenizer.encode(ending)
            with torch.inference_mode():
                rows = net(torch.tensor([context + answer]))[0, len(context) - 1 : -1].log_softmax(-1)
            sums.append(rows.gather(1, torch.tensor(answer)[:, None]).sum().item())
        right += int(np.argmax(sums) == item["label"])
    (found,) = evaluate_tasks(net, tokenizer, ["ArithMark-2.0"], data_dir)
    assert found.metrics["acc"][0] == right / 9 and found.chance == 0.25 and found.items == 9


def test_a_tokenizer_with_a_bos_of_its_own_scores_as_in_lm_eval(tokenizer, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ant5m.eval.harness import AntLM

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    foreign = Tokenizer(backend, "</s>", "<s>")
    torch.manual_seed(0)
    net = Ant(dataclasses.replace(CONFIG, vocab_size=foreign.vocab_size)).eval()
    export(net, foreign, tmp_path / "hf", ModelCard("foreign"))
    loaded, again = load(tmp_path / "hf")
    assert (again.bos_token, again.eos_token_id) == ("<s>", foreign.eos_token_id)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] == foreign.bos_token_id
    models = (
        HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32"),
        AntLM(net=loaded, tokenizer=again),
    )
    asked = [("", said(3)), ("<s>An", " ant"), (said(5), f" {said(7)}")]
    pairs = [Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(asked)]
    texts = [Instance("loglikelihood_rolling", {}, (said(2, 40, 90),), 0)]
    of_pairs = [model.loglikelihood(pairs) for model in models]
    of_texts = [model.loglikelihood_rolling(texts) for model in models]
    for (expected, _), (got, _) in zip(*of_pairs, strict=True):
        assert got == pytest.approx(expected, abs=1e-3)
    assert of_texts[0] == pytest.approx(of_texts[1], abs=1e-3)


def test_an_answer_that_merges_into_its_context_is_refused(tokenizer):
    """lm-eval's `hf` model fails an assertion where nothing is left of the answer."""
    from lm_eval.api.instance import Instance

    from ant5m.eval.harness import AntLM

    backend = tokenizers.Tokenizer(
        models.BPE(
            {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6},
            [("a", "b"), ("b", "c"), ("ab", "c")],
        )
    )
    merging = Tokenizer(backend, "<|endoftext|>")
    net = Ant(dataclasses.replace(CONFIG, vocab_size=7)).eval()
    lm = AntLM(net=net, tokenizer=merging)

    def ask(context, answer):
        return lm.loglikelihood([Instance("loglikelihood", {}, (context, answer), 0, ("piqa", 7, 1))])

    with pytest.raises(UserError, match="piqa, item 7: the answer 'bc' has no tokens of its own"):
        ask("a", "bc")
    with pytest.raises(UserError, match="the answer '' has no tokens"):
        ask("a", "")
    with torch.inference_mode():  # as lm-eval has it: what is left, behind the context as it is alone
        expected = net(torch.tensor([[1]]))[0, -1].log_softmax(-1)[1].item()
    assert ask("a", "bca") == [(pytest.approx(expected, abs=1e-5), False)]


def test_files_in_the_layout_of_the_hub(tmp_path):
    piqa = tmp_path / "piqa" / "plain_text"
    for split, count in (("train", 1), ("validation", 2), ("test", 1)):
        for number in range(count):
            write(piqa / split / f"{number:04}.jsonl", [{"split": split, "number": number}])
    found = choose_files(find_files(tmp_path), tmp_path, ["piqa"], "validation")
    assert found[0] == piqa / "validation" / "0000.jsonl" and "train" not in str(found)
    assert [row["number"] for row in read_rows(found[0], Struct)] == [0, 1]
    write(tmp_path / "sciq" / "test-00001-of-00003.jsonl", [{"number": 1}])
    with pytest.raises(UserError, match=r"00000-of-00003\.jsonl is missing"):
        read_rows(tmp_path / "sciq" / "test-00001-of-00003.jsonl", Struct)


def test_another_split_than_lm_evals_is_named(net, tokenizer, data_dir, tmp_path):
    shutil.copy(data_dir / "piqa" / "piqa_validation.jsonl", tmp_path / "piqa_test.jsonl")
    with pytest.warns(UserWarning, match="taken, because lm-eval's validation split is not"):
        evaluate_tasks(net, tokenizer, ["piqa"], tmp_path, 1)


def test_the_table_reaches_terminal_run_report_and_card(run, data_dir, tmp_path, capsys):
    words = ["eval", str(run), "--tasks", "piqa,arc_easy", "--data-dir", str(data_dir)]
    assert call(words) == 0
    page = capsys.readouterr().out
    for text in (page, (run / "report.md").read_text(), (run / "hf" / "README.md").read_text()):
        assert "piqa" in text and "48.9" in text and "26.4" in text and "±" in text
        assert re.search(r"\b9\b" if text is page else "9 items", text)
    kept = read_json(run / "eval.json")["tasks"]
    assert [one["task"] for one in kept] == ["piqa", "arc_easy"]
    assert (
        call(["eval", str(run), "--tasks", "ArithMark-2.0", "--data-dir", str(data_dir), "--limit", "4"]) == 0
    )
    text = (run / "report.md").read_text()
    assert text.count(results.SECTION) == 1 and "ArithMark-2.0" in text and "piqa" in text
    assert text.index("## Result") < text.index(results.SECTION) < text.index("## Samples")
    assert call(["export", str(run), str(tmp_path / "out")]) == 0
    assert "ArithMark-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_two_models_are_compared_item_by_item(run, folder, tokenizer, data_dir, tmp_path, capsys):
    torch.manual_seed(1)
    export(Ant(CONFIG).eval(), tokenizer, tmp_path / "other", ModelCard("other"))
    words = ["eval", str(run), str(tmp_path / "other"), "--tasks", "piqa,hellaswag,wikitext"]
    words += ["--data-dir", str(data_dir)]
    assert call([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (compared,) = found["comparisons"]
    assert [one["task"] for one in compared["tasks"]] == ["piqa", "hellaswag"]
    for one in compared["tasks"]:
        sides = [
            next(task for task in model["tasks"] if task["task"] == one["task"]) for model in found["models"]
        ]
        first, second = (side["metrics"]["acc_norm"]["value"] for side in sides)
        assert one["metric"] == "acc_norm" and one["difference"] == second - first
        assert one["low"] <= one["difference"] <= one["high"] and one["adjusted"] >= one["p"]
    assert call(words) == 0
    page = capsys.readouterr().out
    assert "no difference shown" in page and max(map(len, page.splitlines())) <= 80
    assert call(["eval", str(run), str(folder)]) == 2
    assert "compared in tasks" in capsys.readouterr().err


def test_a_stopped_evaluation_goes_on(run, data_dir, monkeypatch, capsys):
    whole = tasks._Suite._measure
    measured = []

    def stopped(self, task, name, settings):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(name)
        return whole(self, task, name, settings)

    words = ["eval", str(run), "--tasks", "piqa,arc_easy,hellaswag", "--data-dir", str(data_dir), "--json"]
    monkeypatch.setattr(tasks._Suite, "_measure", stopped)
    assert call(words) == 130
    capsys.readouterr()
    assert len(read_json(run / "eval.json")["tasks"]) == 2
    measured.clear()
    assert call(words) == 0
    assert measured == ["hellaswag"]
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert [one["task"] for one in found] == ["piqa", "arc_easy", "hellaswag"]


def test_other_weights_do_not_inherit_results(run, data_dir):
    result = TaskResult("piqa", {"acc": (0.5, 0.1)}, 9, 0.5, SETTINGS)
    results.record_task(run / "eval.json", "old", "step-1", result)
    assert results.recorded(run / "eval.json", "new") == []
    assert results.recorded(run / "eval.json", "old") == [result]
    text = {"text": "x", "checkpoint": "step-1", "held_out": True, "loss": 1.0}
    write_json(run / "eval.json", {"perplexity": [text], "tasks": read_json(run / "eval.json")["tasks"]})
    results.record_task(run / "eval.json", "new", "step-2", result)
    assert read_json(run / "eval.json")["perplexity"] == [text]
    assert len(read_json(run / "eval.json")["tasks"]) == 2


def test_a_task_without_data_is_named_and_the_rest_goes_on(net, tokenizer, data_dir):
    with pytest.warns(UserWarning, match=r"mmlu is left out: .* has no file for mmlu"):
        found = evaluate_tasks(net, tokenizer, ["mmlu", "piqa"], data_dir)
    assert [result.task for result in found] == ["piqa"]


def test_figures_near_chance_are_marked():
    def row(value, error):
        (made,) = rows(
            [TaskResult("piqa", {"acc": (value, error)}, 100, 0.5, {"limit": None, "lm_eval": "1"})]
        )
        return made

    assert row(0.59, 0.05).verdict == "at chance" and row(0.41, 0.05).verdict == "at chance"
    assert row(0.61, 0.05).verdict == "above chance" and row(0.39, 0.05).verdict == "below chance"
    assert row(0.61, 0.05)[:4] == ("piqa", "acc", "61.0 ± 5.0", "50.0")
    assert row(0.61, None).verdict == ""
    (inner,) = parts([TaskResult("blimp_x", {"acc": (0.5, 0.1)}, 10, 0.5, SETTINGS)])
    assert inner.task == "blimp_x" and inner.published == ""


def test_no_word_is_broken_on_a_terminal_of_80_columns():
    over = {"tokens": 1_302_638}
    found = [
        TaskResult("truthfulqa_mc2", {"acc_norm": (0.449, 0.016)}, 817, 0.5, SETTINGS),
        TaskResult("lambada_openai", {"perplexity": (847_437.0, 77_596.0)}, 5_153, None, SETTINGS),
        TaskResult("wikitext", {"token_perplexity": (443.85, None)}, 60, None, SETTINGS, over),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(_task_table(found, Path("runs/mine/checkpoints/step-00001221")))
    words = console.file.getvalue().split()
    for word in ("truthfulqa_mc2", "acc_norm", "below", "847,437", "77,596", "token_perplexity", "1,302,638"):
        assert word in words


def test_names_stand_for_tasks_in_the_tables_order():
    assert known_tasks(["piqa,copa", "blimp"]) == ["copa", "blimp", "piqa"]
    assert len(known_tasks(["all"])) == 19


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "nope"], "there is no task 'nope'"),
        (["--tasks", "piqa", "--limit", "0"], "at least 1 item"),
        (["--tasks", "piqa", "--data", "x"], "--data is text for perplexity"),
        (["--limit", "3"], "are for tasks"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], "is not a folder of benchmark files"),
        (["--tasks", "mmlu", "--data-dir", "{data}"], "no task has items here"),
        (["--tasks", "piqa", "--data-dir", "{bad}"], "item 2: no field sol2 (found: goal, sol1, label)"),
        (["--tasks", "arc_easy", "--data-dir", "{bad}"], "arc_easy.jsonl, item 1: choices: expected object"),
        (["--tasks", "hellaswag", "--data-dir", "{bad}"], "line 1 is not valid JSON"),
    ],
)
def test_mistakes_get_one_line(folder, data_dir, tmp_path, capsys, words, said):
    bad = tmp_path / "bad"
    item = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}
    write(bad / "piqa.jsonl", [item, {key: item[key] for key in ("goal", "sol1", "label")}])
    write(bad / "arc_easy.jsonl", [{"question": "why?", "choices": "because", "answerKey": "A"}])
    (bad / "hellaswag.jsonl").write_text("{oops\n")
    places = {"data": data_dir, "bad": bad}
    assert call(["eval", str(folder), *(word.format(**places) for word in words)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert captured.out == "" and len(lines) == 1 and said in lines[0]
    assert "Traceback" not in captured.err


def test_a_run_without_a_model_is_named(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert call(["eval", str(tmp_path / "run"), "--tasks", "piqa"]) == 2
    assert "has no good checkpoint yet" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(net, data_dir):
    other = train_tokenizer([said(seed) + chr(300 + seed) * 9 for seed in range(400)], vocab_size=400)
    with pytest.raises(UserError, match="do not belong together"):
        evaluate_tasks(net, other, ["piqa"], data_dir)


def test_without_lm_eval_it_says_what_to_install(folder, data_dir, monkeypatch, capsys):
    tasks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert call(["eval", str(folder), "--tasks", "piqa", "--data-dir", str(data_dir)]) == 2
    assert "pip install 'ant5m[eval]'" in capsys.readouterr().err
    assert call(["eval", str(folder), "--tasks", "ArithMark-2.0", "--data-dir", str(data_dir)]) == 0
