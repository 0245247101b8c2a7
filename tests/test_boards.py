"""The boards' protocols beside plain re-implementations, their formulas by published numbers, and ties."""

import json
import math

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors

from ant5m.cli import call
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval import arithmark, babylm, boards, glint, results, schemas, tasks
from ant5m.eval.benchmarks import BENCHMARKS
from ant5m.eval.items import read_rows
from ant5m.eval.protocol import FILE, Model
from ant5m.eval.scoring import Score, score
from ant5m.eval.tasks import evaluate_tasks
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

transformers = pytest.importorskip("transformers")

SENTENCE = "the ant carries a leaf along the path and other ants follow it to the nest by an old tree"
WORDS = SENTENCE.split()
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=300,
    initializer_range=0.3,
)


def said(seed: int, low: int = 3, high: int = 9) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, random.integers(low, high)))


def write(path, rows, before: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(before + "".join(json.dumps(row) + "\n" for row in rows).encode())


ARITHMARK = [
    {
        "ind": i,
        "activity_label": "add",
        "ctx": f"{i} + 11 =",
        "endings": [f" {i + 11 + d}" for d in (-1, 0, 1, 90 * (i % 2) + 2)],
        "label": str(i % 3) if i % 2 else i % 3,
    }
    for i in range(9)
]
PAIRS = {
    f"part_{part}": [
        {"sentence_good": said(9 * part + i, 1, 9), "sentence_bad": said(50 * part + i)} for i in range(6)
    ]
    + [{"sentence_good": said(part), "sentence_bad": said(part)}]  # a tie
    for part in range(3)
}
ARC = [
    {
        "question": f"Which of the ants {said(i)}?",
        "choices": {
            "text": [said(i + 30 * j, 1, 5) for j in range(3 + i % 2)],
            "label": list("ABCD")[: 3 + i % 2],
        },
        "answerKey": "ABC"[i % 3],
    }
    for i, n in zip(range(9), [3, 4] * 5, strict=False)
]
TEXT = [{"text": line} for i in range(60) for line in (f" = {said(i)} = \n", "", f" {said(i, 20, 30)} \n")]
EWOK = [
    {
        **{f"Context{n}": f"{said(i + 40 * n)}." for n in (1, 2)},
        **{f"Target{n}": f"{said(i + 70 * n)}." for n in (1, 2)},
        "Domain": ("agents", "space")[i % 2],
        **dict.fromkeys(("ContextType", "ContextDiff", "TargetDiff"), "direct"),
    }
    for i in range(10)
]
ENTITIES = [
    {
        "input_prefix": f"{said(i)}. Box {i} contains",
        "options": [f" {said(i + j)}." for j in range(5)],
        "numops": i % 2,
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    digits = " ".join(f"{i} + {i} =" for i in range(99))
    return train_tokenizer([" ".join(WORDS[i:] + WORDS[:i]) + digits for i in range(9)] * 9, vocab_size=300)


@pytest.fixture(scope="module")
def net(tokenizer) -> Ant:
    torch.manual_seed(0)
    return Ant(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(net, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("boards") / "hf"
    export(net, tokenizer, path, ModelCard("tiny"))
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Items under the official names of files and folders."""
    path = tmp_path_factory.mktemp("items")
    write(path / "arithmark-3.jsonl", ARITHMARK, b"\xef\xbb\xbf")
    write(path / "arithmark_2.0.jsonl", ARITHMARK[:5])
    for part, rows in PAIRS.items():
        write(path / "evaluation_data" / "full_eval" / "supplement_filtered" / f"{part}.jsonl", rows)
        write(path / "blimp" / "data" / f"{part}.jsonl", rows)
    write(path / "ewok_filtered" / "agents.jsonl", EWOK)
    write(path / "entity_tracking" / "regular.jsonl", ENTITIES)
    write(path / "ARC-Easy-Test.jsonl", ARC)
    write(path / "wikitext-2-raw-v1" / "test.jsonl", TEXT)
    return path


@pytest.fixture(scope="module")
def plain(folder):
    """(sum of log-probabilities of text behind a beginning, their number), by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)

    def score(ids: list[int], first: int = 1) -> tuple[float, int]:
        if len(ids) == first:
            return 0.0, 0
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        wanted = torch.tensor(ids[first:])
        return rows[first - 1 :].gather(1, wanted[:, None]).sum().item(), len(wanted)

    def ids(text: str) -> list[int]:
        return encode(text, add_special_tokens=False)["input_ids"]

    return score, ids


@pytest.fixture(scope="module")
def measured(net, tokenizer, data_dir):
    names = [
        "ArithMark-3.0,ArithMark-2.0,glint_blimp,glint_arc_easy,glint_wikitext",
        "babylm_supplement,babylm_ewok,babylm_entity_tracking",
    ]
    with pytest.warns(UserWarning, match="scores do not compare"):
        return {one.task: one for one in evaluate_tasks(net, tokenizer, names, data_dir)}


def test_arithmark_takes_the_largest_mean_or_sum(measured, plain):
    score, ids = plain
    right = {"acc": [], "acc_norm": []}
    for row in ARITHMARK:
        context, endings = ids(row["ctx"]), [ids(ending) for ending in row["endings"]]
        scored = [score(context + ending, len(context)) for ending in endings]
        right["acc"].append(np.argmax([s for s, _ in scored]) == int(row["label"]))
        right["acc_norm"].append(np.argmax([s / n for s, n in scored]) == int(row["label"]))
    found = measured["ArithMark-3.0"]
    assert found.values == {metric: [float(r) for r in each] for metric, each in right.items()}
    assert found.chance == 0.25 and found.items == 9 and measured["ArithMark-2.0"].items == 5
    inner = np.mean([0 < int(row["label"]) < 3 for row in ARITHMARK])
    assert found.baselines == {"a middle value": inner / 2}


def test_glint_scores_all_but_the_first_token_of_256(measured, plain):
    score, ids = plain
    for part, rows in PAIRS.items():
        sums = [
            [score(ids(row[key])[:256], 1)[0] if len(ids(row[key])) > 1 else 0.0 for key in row]
            for row in rows
        ]
        found = measured[f"glint_blimp_{part}"].values
        assert found["acc"] == [float(good > bad) for good, bad in sums]
        behind = [[score([0, *ids(row[key])], 1)[0] for key in row] for row in rows]
        assert found["acc_first_word"] == [float(good > bad) for good, bad in behind]
        assert found["acc"][-1] == 0.0  # the tie
    right = []
    for row in ARC:
        sums = [score(ids(f"{row['question']} {text}")[:256])[0] for text in row["choices"]["text"]]
        right.append(float("ABCD"[int(np.argmax(sums))] == row["answerKey"]))
    assert measured["glint_arc_easy"].values["acc"] == right
    assert measured["glint_blimp"].metrics["acc"][0] == np.mean(
        [np.mean(measured[f"glint_blimp_{part}"].values["acc"]) for part in PAIRS]
    )


def test_glint_perplexity_is_per_byte_of_windows_of_256(measured, plain):
    score, ids = plain
    text = "\n\n".join(row["text"] for row in TEXT)
    tokens = ids(text)
    windows = [score(tokens[i : i + 256], 1) for i in range(0, len(tokens), 256)]
    per_token = math.exp(-sum(s for s, _ in windows) / sum(n for _, n in windows))
    found = measured["glint_wikitext"].metrics
    assert len(windows) > 3 and found["token_perplexity"][0] == pytest.approx(per_token, rel=1e-5)
    expected = per_token ** (len(tokens) / len(text.encode()))
    assert found["byte_perplexity"][0] == pytest.approx(expected, rel=1e-5)


def test_babylm_scores_phrases_as_offsets_say(measured, plain):
    score, ids = plain

    def phrase(before: str, text: str) -> float:
        return score(ids(before + text), len(ids(before)))[0]  # words do not merge here

    for part, rows in PAIRS.items():
        sums = [
            [score(ids(row[key]), 1)[0] if len(ids(row[key])) > 1 else 0.0 for key in row] for row in rows
        ]
        found = measured[f"babylm_supplement_{part}"].values["acc"]
        assert found == [float(good >= bad) for good, bad in sums] and found[-1] == 1.0  # the tie: the first
    own = {"agents": [], "space": []}
    for row in EWOK:
        s = {(c, t): phrase(row[f"Context{c}"], f" {row[f'Target{t}']}") for c in (1, 2) for t in (1, 2)}
        own[row["Domain"]].append((s[1, 1] > s[2, 1], s[2, 2] > s[1, 2], s[1, 1] > s[1, 2]))
    for domain, rows in own.items():
        found = measured[f"babylm_ewok_{domain}"].values
        assert found["acc"] == [float(a and b) for a, b, _ in rows]
        assert found["acc_targets"] == [(a + b) / 2 for a, b, _ in rows]
        assert found["acc_choice"] == [float(c) for _, _, c in rows]
    assert (
        measured["babylm_ewok"].chance_of("acc") == 0.25
        and measured["babylm_ewok"].chance_of("acc_choice") == 0.5
    )
    for ops in (0, 1):
        rows = [row for row in ENTITIES if row["numops"] == ops]
        sums = [[phrase(row["input_prefix"], option) for option in row["options"]] for row in rows]
        found = measured[f"babylm_entity_tracking_regular_{ops}_ops"].values["acc"]
        assert found == [float(np.argmax(each) == 0) for each in sums]


def test_no_protocol_adds_a_bos(tokenizer):
    """A post-processor that adds one is dropped: training never saw it, and the export has none."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    asked = []

    def ask(requests):
        asked.extend(requests)
        return [Score(0.0, False)] * len(requests)

    model = Model(ask, Tokenizer(backend, "<|endoftext|>", "<s>"), 300)
    babylm.phrases(model, [("", "the ant"), ("the", " ant")])
    the, ant = model.ids(["the", " ant"])
    assert [tuple(map(list, one)) for one in asked] == [(the, ant), (the, ant)]
    asked.clear()
    model.sentences(model.ids(["the ant"]))
    assert [tuple(map(list, one)) for one in asked] == [(the[:1], the[1:] + ant)]


def decided(evaluate, rows, *scores):
    """What a protocol makes of given log-likelihoods."""
    model = Model.__new__(Model)
    model.ask = lambda requests: [Score(value, False) for value in scores]
    model.context, model.eos_token_id = 300, 0
    model.ids = lambda texts: [[1, 2] for _ in texts]
    model.encode = lambda texts, special=False: [
        type("E", (), {"ids": [1, 2], "offsets": [(0, 1), (1, len(text))]})() for text in texts
    ]
    (found,) = evaluate(model, [{FILE: "x.jsonl", **row} for row in rows]).values()
    return found.values


def test_ties_go_to_the_first_of_the_endings():
    row = {**ARITHMARK[0], "label": "1"}
    assert decided(arithmark.arithmark, [row], -3, -2, -2, -9) == {"acc_norm": [1.0], "acc": [1.0]}
    assert decided(arithmark.arithmark, [{**row, "label": 2}], -3, -2, -2, -9)["acc"] == [0.0]
    assert decided(glint.arc_easy, [{**ARC[0], "answerKey": "A"}], -2, -2, -3) == {"acc": [1.0]}
    assert decided(babylm.entity_tracking, [ENTITIES[0]], -2, -2, -2, -2, -2) == {"acc": [1.0]}
    # "likelier" is not "as likely"
    assert decided(babylm.ewok, [EWOK[0]], -2, -2, -2, -2) == {
        "acc": [0.0],
        "acc_targets": [0.0],
        "acc_choice": [1.0],
    }


def test_the_published_figures_come_out():
    def known(*values):
        return [(value, None) for value in values]

    index, _ = boards.open_slm_index(*known(39.83, 51.01, 27.13, 66.76, 38.9))
    assert index == (pytest.approx(23.041095890410958, abs=1e-9), None)
    (overall, _), factor, (efficiency, _) = boards.glint_scores(*known(79.22, 65.91), 1.8620, 139.3e6)
    assert [round(overall, 2), round(factor, 4), round(efficiency, 2)] == [81.70, 1.0031, 81.96]
    below, _ = boards.open_slm_index(*known(20, 25, 25, 50, 25))
    assert below[0] == pytest.approx(100 * (20 - 25) / 75 / 3.65)  # negative terms stay
    assert boards.glint_scores(*known(50, 25), 900.0, 500)[1] == 1.5  # clipped, as is the perplexity
    assert boards.glint_scores(*known(50, 25), 900.0, 500)[0][0] == pytest.approx(25)


def test_the_error_of_the_index_is_that_of_resampled_items():
    random = np.random.default_rng(0)
    shares, sizes = np.array([0.4, 0.5, 0.27, 0.66, 0.39]), np.array([10042, 2376, 1172, 1838, 1000])
    drawn = random.binomial(sizes, shares, (4000, 5)) / sizes
    indices = [boards.open_slm_index(*[(100 * v, None) for v in row])[0][0] for row in drawn]
    errors = np.sqrt(shares * (1 - shares) / sizes)
    (_, error), _ = boards.open_slm_index(*zip(100 * shares, 100 * errors, strict=True))
    assert error == pytest.approx(np.std(indices), rel=0.05)


def test_the_row_for_the_board(folder, tmp_path, capsys):
    items = tmp_path / "items"
    write(items / "arithmark-3.jsonl", ARITHMARK)
    write(items / "arithmark_2.0.jsonl", ARITHMARK)
    write(items / "arc_easy_test.jsonl", ARC)
    write(items / "arc_challenge_test.jsonl", ARC)
    write(
        items / "piqa_val.jsonl",
        [{"goal": said(i), "sol1": said(i + 5), "sol2": said(i + 9), "label": 0} for i in range(5)],
    )
    hellaswag = {
        "activity_label": "x",
        "ctx_a": "the",
        "ctx_b": "ant",
        "endings": [said(i) for i in range(4)],
    }
    write(items / "hellaswag_val.jsonl", [{**hellaswag, "label": 1}] * 5)
    words = ["eval", str(folder), "--tasks", "open-slm", "--data-dir", str(items)]
    words += ["--output", str(tmp_path / "eval.json")]
    assert call([*words, "--json", "--repository", "me/tiny"]) == 0
    (board,) = json.loads(capsys.readouterr().out)["boards"]
    row = json.loads((tmp_path / "open-slm.json").read_text())
    assert row == board["row"]
    names = "name org params paramsDisplay arc hellaswag piqa arcChall arithmark3 arithmark2 links"
    assert " ".join(row) == names
    assert (row["name"], row["org"], row["links"]) == (
        "tiny",
        "me",
        {"card": "https://huggingface.co/me/tiny"},
    )
    assert row["params"] == sum(weight.numel() for weight in Ant(CONFIG).parameters())
    assert board["figures"]["index"]["stderr"] > 0
    assert call(words) == 0  # again, from what is kept
    page = capsys.readouterr().out
    assert (
        f"{board['figures']['index']['value']:.3f}" in page
        and "a middle value" in page
        and max(map(len, page.split("open-slm (")[0].splitlines())) <= 80
    )
    (items / "piqa_val.jsonl").unlink()
    assert call([*words, "--output", str(tmp_path / "other.json")]) == 0
    assert "no figure: piqa has no result here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("ArithMark-3.0", {"endings": [" 1", " 2", " 3"]}, "item 2: endings: expected array of length >= 4"),
        (
            "ArithMark-3.0",
            {"endings": [" 1", " 2", "3", " 4"]},
            "the ending '3' does not begin with a space",
        ),
        ("ArithMark-3.0", {"endings": [" 1", " 2", " ", " 4"]}, "item 2: endings["),
        ("ArithMark-3.0", {"label": "4"}, "item 2: label"),
        ("ArithMark-3.0", {"ctx": None}, "item 2: ctx"),
        ("babylm_ewok", {"Target1": ""}, "item 2: Target1"),
        ("babylm_entity_tracking", {"options": [" a"]}, "item 2: options"),
        ("glint_arc_easy", {"answerKey": "E"}, "item 2: answerKey 'E' is not one of A, B, C"),
    ],
)
def test_a_wrong_item_is_named(folder, tmp_path, capsys, task, change, said):
    rows, name = {
        "ArithMark-3.0": (ARITHMARK, "arithmark-3.jsonl"),
        "babylm_ewok": (EWOK, "ewok_filtered/a.jsonl"),
        "babylm_entity_tracking": (ENTITIES, "entity_tracking/a.jsonl"),
        "glint_arc_easy": (ARC, "arc_easy_test.jsonl"),
    }[task]
    write(tmp_path / name, [rows[0], {**rows[1], **change}])
    assert call(["eval", str(folder), "--tasks", task, "--data-dir", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert name in line and said in line


QUESTION = {"choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}
GOOD = {
    "boolq": ("boolq.jsonl", {"question": "is it", "passage": "it is", "label": 1}),
    "copa": (
        "copa.jsonl",
        {"premise": "It rains.", "choice1": "a", "choice2": "b", "question": "cause", "label": 0},
    ),
    "blimp": ("blimp/adjunct_island.jsonl", PAIRS["part_0"][0]),
    "winogrande": ("winogrande.jsonl", {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}),
    "truthfulqa_mc2": (
        "truthful.jsonl",
        {"question": "is it", "mc2_targets": {"choices": ["yes", "no"], "labels": [1, 0]}},
    ),
    "piqa": ("piqa.jsonl", {"goal": "go", "sol1": "left", "sol2": "right", "label": 0}),
    "openbookqa": ("openbookqa.jsonl", {"question_stem": "is it", **QUESTION}),
    "arc_easy": ("arc_easy.jsonl", {"question": "is it", **QUESTION}),
    "arc_challenge": ("arc_challenge.jsonl", {"question": "is it", **QUESTION}),
    "hellaswag": (
        "hellaswag.jsonl",
        {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": list("abcd"), "label": "3"},
    ),
    "swag": (
        "swag.jsonl",
        {"startphrase": "it", **{f"ending{i}": str(i) for i in range(4)}, "label": 2},
    ),
    "mmlu": (
        "mmlu.jsonl",
        {"question": "is it", "subject": "astronomy", "choices": list("abcd"), "answer": 1},
    ),
    "race": ("race.jsonl", {"article": "it is", "problems": "[]"}),
    "sciq": (
        "sciq.jsonl",
        {
            "support": "",
            "question": "is it",
            "correct_answer": "a",
            **{f"distractor{i}": "b" for i in (1, 2, 3)},
        },
    ),
    "commonsense_qa": ("commonsense_qa.jsonl", {"question": "is it", **QUESTION}),
    "lambada_openai": ("lambada_openai.jsonl", {"text": "it is so"}),
    "wikitext": ("wikitext.jsonl", {"page": "it is so"}),
    "ArithMark-3.0": ("arithmark-3.jsonl", ARITHMARK[0]),
    "ArithMark-2.0": ("arithmark_2.0.jsonl", ARITHMARK[0]),
    "glint_blimp": ("blimp/part.jsonl", PAIRS["part_0"][0]),
    "glint_arc_easy": ("arc_easy_test.jsonl", ARC[0]),
    "glint_wikitext": ("wikitext/test.jsonl", {"text": "it is so"}),
    "babylm_blimp": ("blimp_filtered/part.jsonl", PAIRS["part_0"][0]),
    "babylm_supplement": ("supplement_filtered/part.jsonl", PAIRS["part_0"][0]),
    "babylm_ewok": ("ewok_filtered/part.jsonl", EWOK[0]),
    "babylm_entity_tracking": ("entity_tracking/part.jsonl", ENTITIES[0]),
}
"""of every task a file and an item"""


def faults_of(row):
    """(what is wrong, the item with it)."""
    first = next(name for name in row if name not in ("activity_label", "ind", "support"))
    yield f"no field {first}", {name: value for name, value in row.items() if name != first}
    yield "no field ", {"nothing": "of this task"}
    yield f"item 2: {first}", {**row, first: 7}
    yield "not a JSON object", [row]
    for label in ("label", "answer", "answerKey"):
        if label in row:
            yield "item 2: ", {**row, label: 7}
            yield "item 2: ", {**row, label: "Z"}
    if "endings" in row:
        yield "item 2: endings", {**row, "endings": row["endings"][:3]}
        yield "item 2: endings[", {**row, "endings": [*row["endings"][:3], ""]}
    if "choices" in row and isinstance(row["choices"], dict):
        yield "2 answers but 1 labels", {**row, "choices": {"text": ["yes", "no"], "label": ["A"]}}
        yield "item 2: ", {**row, "choices": {"text": ["yes", ""], "label": ["A", "B"]}}


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_fault_of_every_task_is_named(net, tokenizer, tmp_path, task):
    name, row = GOOD[task]
    faults = list(faults_of(row))
    assert len(faults) >= 4
    for said, wrong in faults:
        write(tmp_path / name, [row, wrong], b"\xef\xbb\xbf")  # a byte-order mark is none
        with pytest.raises(UserError) as caught:
            evaluate_tasks(net, tokenizer, [task], tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
        assert said in str(caught.value) and "item 2" in str(caught.value).replace("line 2", "item 2")


def test_items_that_come_twice_are_named(tmp_path):
    """By a warning: MMLU as published has 27 of 14,042, LAMBADA two."""
    rows = [GOOD["piqa"][1] | {"goal": said(i), "label": i % 2} for i in range(30)]
    write(tmp_path / "piqa.jsonl", [*rows, rows[4]])
    with pytest.warns(UserWarning, match=r"piqa.jsonl: 1 of 31 items .*item 31 is the same as item 5"):
        read_rows(tmp_path / "piqa.jsonl", schemas.Piqa)
    write(tmp_path / "lines.jsonl", [{"text": ""}] * 9)
    read_rows(tmp_path / "lines.jsonl", schemas.Line)


OWN = [name for name, benchmark in BENCHMARKS.items() if not benchmark.folder]


@pytest.mark.filterwarnings("ignore:.*scores do not compare")
def test_a_stopped_evaluation_goes_on_to_the_same_results(net, tokenizer, data_dir, tmp_path, monkeypatch):
    """Stopped after each result in turn, also in the middle of a task's parts."""
    asked = []

    def counted(*arguments):
        asked.append(1)
        return score(*arguments)

    monkeypatch.setattr(tasks, "score", counted)
    whole = evaluate_tasks(net, tokenizer, OWN, data_dir)
    passes = len(asked)
    assert {name for name in OWN if name not in {one.task for one in whole}} == set()
    for stop in range(1, len(whole), 3):
        path = tmp_path / f"{stop}.json"
        left = iter(range(stop))

        def keep(result, path=path, left=left):
            results.record_task(path, "weights", "step", result)
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate_tasks(net, tokenizer, OWN, data_dir, on_result=keep)
        known = results.recorded(path, "weights")
        assert len(known) == stop + 1
        asked.clear()
        assert evaluate_tasks(net, tokenizer, OWN, data_dir, known=known) == whole
        assert (len(asked) < passes) == any(one.task in OWN for one in known)
    asked.clear()
    assert evaluate_tasks(net, tokenizer, OWN, data_dir, known=whole) == whole and not asked


def test_a_file_of_another_task_is_named(folder, tmp_path, capsys):
    write(tmp_path / "arithmark-3.jsonl", PAIRS["part_0"])
    assert call(["eval", str(folder), "--tasks", "ArithMark-3.0", "--data-dir", str(tmp_path)]) == 2
    assert "item 1: no field ctx, endings, label (found: sentence_good" in capsys.readouterr().err
