"""Conversations: written by a chat template, packed with a mask, learned from, and held."""

import dataclasses
import io
import itertools
import json
import random
import sys

import numpy as np
import pytest
import torch
from test_resume import fingerprint, interrupt  # noqa: F401
from test_train import MODEL
from tokenizers import AddedToken

from ant5m.cli import call
from ant5m.data import packing
from ant5m.data.conversations import PLAIN_TEMPLATE, ChatTemplate, Conversations, end_ids
from ant5m.data.corpus import Corpus
from ant5m.data.loader import Loader, sequences
from ant5m.data.packing import pack
from ant5m.data.resident import ResidentTokens
from ant5m.data.shards import IGNORE, Shards, Tokens
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.files import write_json
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import load_with_tokenizer
from ant5m.train import TrainConfig, pretrain
from ant5m.train.metrics import read_metrics
from ant5m.train.optimizer import Optimizer
from ant5m.train.schedule import Schedule
from ant5m.train.step import Step

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' + '\n' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "ant",
    "carries",
    "a",
    "leaf",
    "home",
    "while",
    "other",
    "ants",
    "build",
    "and",
    "sleep",
    "under",
    "old",
    "green",
    "trees",
]


def chats(count, seed=0):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": " ".join(draw.choices(WORDS, k=5)) + "?"})
            messages.append({"role": "assistant", "content": " ".join(draw.choices(WORDS, k=4)) + " 🐜."})
        rows.append(messages)
    return rows


def write_chats(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer([" ".join(WORDS)] * 3 + ["User:\nAssistant:\nSystem:\nBe brief."] * 3, 290)


@pytest.fixture(scope="module")
def chatml(plain, tmp_path_factory):
    """The same with two more tokens and a template that uses them."""
    folder = tmp_path_factory.mktemp("chatml")
    plain.save(folder / "plain")
    backend = Tokenizer.load(folder / "plain").backend
    backend.add_special_tokens([AddedToken(token) for token in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(backend, settings={"chat_template": CHATML})


def test_ids_and_mask_are_those_of_transformers(chatml, tmp_path):
    transformers = pytest.importorskip("transformers")
    chatml.save(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    template = ChatTemplate(Tokenizer.load(tmp_path / "tokenizer"))
    rows = chats(20)
    ids, learned, lengths = template.encode([template.split(row) for row in rows])
    begin = 0
    for row, length in zip(rows, lengths, strict=True):
        expected = theirs.apply_chat_template(row, return_assistant_tokens_mask=True, return_dict=True)
        assert ids[begin : begin + length] == [*expected["input_ids"], chatml.eos_token_id]
        assert learned[begin : begin + length] == [*map(bool, expected["assistant_masks"]), False]
        begin += length
        asked = row[:-1]
        assert (
            template.prompt(asked)
            == theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        )
    assert template.end_ids == end_ids(chatml) == (chatml.eos_token_id, chatml.vocab["<|im_end|>"])


def test_a_tokenizer_without_a_template_gets_a_plain_one(plain):
    with pytest.raises(UserError, match="no chat template: the model was not trained on conversations"):
        ChatTemplate(plain)
    template = ChatTemplate(plain, PLAIN_TEMPLATE)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template.split([*said, *said]).parts == (
        ("User:\na\n\nAssistant:\n", False),
        ("b<|endoftext|>", True),
        ("\n\nUser:\na\n\nAssistant:\n", False),
        ("b<|endoftext|>", True),
    )
    ids, learned, (length,) = template.encode([template.split(said)])
    assert ids.count(plain.eos_token_id) == 1 and ids[-1] == plain.eos_token_id and learned[-1]
    assert plain.decode(ids) == "User:\na\n\nAssistant:\nb<|endoftext|>" and length == len(ids)
    assert template.end_ids == (plain.eos_token_id,)


@pytest.mark.parametrize(
    "messages, what",
    [
        ([], "empty"),
        (None, "not a list"),
        ("a talk", "text, not a list"),
        ([1], "message 1 is not an object"),
        ([{"role": "user"}], "message 1 has no content that is text"),
        ([{"role": "user", "content": None}], "message 1 has no content that is text"),
        ([{"role": "robot", "content": "a"}], "role 'robot'"),
        ([{"role": "user", "content": "a"}], "nothing to learn"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|im_end|>"}], "control token"),
        ([{"role": "assistant", "content": "\ud800"}], "not UTF-8"),
    ],
)
def test_what_is_no_conversation_is_said(chatml, messages, what):
    with pytest.raises(UserError, match=what):
        ChatTemplate(chatml).split(messages)


@pytest.mark.parametrize(
    "template, what",
    [
        ("{% for", "broken"),
        ("{{ raise_exception('no systems') }}", "no systems"),
        ("{{ messages[7].content }}", "cannot write"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "changes earlier messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot write"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "cannot write"),
    ],
)
def test_a_template_that_does_not_render_is_said(plain, template, what):
    tokenizer = Tokenizer(plain.backend, settings={"chat_template": template})
    with pytest.raises(UserError, match=what):
        ChatTemplate(tokenizer).split(chats(1)[0])
    assert end_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_packing_keeps_masks_and_goes_on_with_the_same_bytes(chatml, tmp_path, monkeypatch):
    rows = chats(150)
    source = write_chats(tmp_path / "chats.jsonl", rows)
    template = ChatTemplate(chatml)

    def packed(name):
        corpus = Conversations.find([source], template)
        pack(corpus, chatml, tmp_path / name, validation_fraction=0.1, shard_tokens=1001)
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.suffix in (".bin", ".mask")}

    whole = packed("whole")
    shards = [Shards.open(tmp_path / "whole", split) for split in ("train", "validation")]
    assert len(shards[0].meta["splits"]["train"]["shards"]) > 3
    there = []
    for part in shards:
        ids, counted = part.tokens[:].tolist(), part.tokens.counted(0, part.num_tokens).tolist()
        ends = [-1, *(i for i, token in enumerate(ids) if token == chatml.eos_token_id)]
        there += [
            (tuple(ids[a + 1 : b + 1]), tuple(counted[a + 1 : b + 1])) for a, b in itertools.pairwise(ends)
        ]
    expected = [template.encode([template.split(row)])[:2] for row in rows]
    assert sorted(there) == sorted((tuple(ids), tuple(learned)) for ids, learned in expected)

    monkeypatch.setattr(packing, "BATCH_BYTES", 1500)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 3000)
    for stop in (2, 5, 9):  # also where shards were ended behind the last journal
        calls = []

        def dying(*arguments, original=packing._write, stop=stop, calls=calls):
            calls.append(0)
            if len(calls) == stop:
                raise KeyboardInterrupt
            original(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(packing, "_write", dying)
            packed("again")
    assert packed("again") == whole


def test_targets_that_do_not_count_are_ignored_everywhere(tmp_path):
    draw = np.random.default_rng(0)
    ids, counted = draw.integers(0, 60_000, 103).astype(np.uint16), draw.random(103) < 0.5
    cuts = [(0, 13), (13, 14), (14, 103)]
    masks = [np.packbits(counted[a:b], bitorder="little") for a, b in cuts]
    tokens = Tokens([ids[a:b] for a, b in cuts], masks)
    starts = np.array([0, 5, 12, 13, 82])
    inputs, targets = np.empty((5, 20), np.int64), np.empty((5, 20), np.int64)
    tokens.gather(starts, 20, inputs, targets)
    expected = np.where(counted, ids.astype(np.int64), IGNORE)
    assert targets.tolist() == [expected[s + 1 : s + 21].tolist() for s in starts]
    resident = ResidentTokens(tokens, torch.device("cpu")).gather(starts, 20)
    assert torch.equal(resident[0], torch.from_numpy(inputs)) and torch.equal(
        resident[1], torch.from_numpy(targets)
    )
    counts = {"documents": 1, "tokens": 103, "bytes": 200, "words": 50}
    meta = {"eos_token_id": 0, "tokenizer_fingerprint": "", "splits": {"train": {**counts, "shards": []}}}
    read = [targets for _, targets in sequences(Shards(tmp_path, "train", meta, tokens), 2, 20)]
    assert torch.cat(read).flatten()[:103].tolist() == expected.tolist()


def one_step(micro, masked, targets, input_ids):
    torch.manual_seed(0)
    net = Ant(MODEL)
    optimizer = Optimizer(net, "adamw", 1e-3, 1e-3, (0.9, 0.99), 1e-8, 0.1, "fp32")
    step = Step(net, optimizer, Schedule(4, "linear", 0.03, 0.4, 0.0), micro, masked=masked)
    loss = step.gradients(input_ids, targets)
    gradients = [p.grad.clone() for p in net.parameters()]
    return loss, gradients, step.update(loss), net


def test_the_mean_is_over_the_targets_that_count_of_the_whole_step():
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(300, (4, 32), generator=draw)
    targets = torch.randint(300, (4, 32), generator=draw)
    targets[0, 3:] = targets[1, :20] = targets[2] = IGNORE  # a micro-batch of one row that has none
    _, _, stats, net = one_step(4, True, targets, input_ids)
    _, _, by_row, net_by_row = one_step(1, True, targets, input_ids)
    torch.manual_seed(0)
    plain = Ant(MODEL).double()
    loss = torch.nn.functional.cross_entropy(plain(input_ids).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    for found in (stats, by_row):
        assert found[0].item() == pytest.approx(loss.item(), rel=1e-6)
        assert found[1].item() == pytest.approx(norm.item(), rel=1e-5)
    for ours, theirs in zip(net.parameters(), net_by_row.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    _, _, nothing, _ = one_step(1, True, torch.full_like(targets, IGNORE), input_ids)
    assert nothing[:2].tolist() == [0, 0]


@pytest.fixture(scope="module")
def chat_data(chatml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    source = write_chats(folder / "chats.jsonl", chats(120))
    pack(Conversations.find([source], ChatTemplate(chatml)), chatml, folder / "data", validation_fraction=0.1)
    write_json(folder / "model.json", {**MODEL.to_dict(), "max_position_embeddings": 64})
    return folder


def test_a_run_resumes_exactly_and_keeps_the_template(chat_data, chatml, tmp_path, interrupt):  # noqa: F811
    config = TrainConfig(
        model=str(chat_data / "model.json"),
        data=chat_data / "data",
        steps=10,
        batch_size=4,
        micro_batch_size=2,
        device="cpu",
        out=tmp_path / "whole",
    )
    pretrain(config)
    halves = dataclasses.replace(config, out=tmp_path / "halves")
    interrupt(15, 5)
    assert pretrain(halves).step == 5
    pretrain(TrainConfig(resume=halves.out))
    assert fingerprint(config.out) == fingerprint(halves.out)
    validation = [line for line in read_metrics(config.out / "metrics.jsonl") if line["kind"] == "validation"]
    assert validation and all("bits_per_byte" not in line for line in validation)
    ends = [chatml.eos_token_id, chatml.vocab["<|im_end|>"]]
    for folder in (config.out, config.out / "hf"):
        tokenizer = load_with_tokenizer(folder)[1]
        assert tokenizer.settings["chat_template"] == CHATML
        assert list(tokenizer.end_ids) == ends
    assert json.loads((config.out / "hf" / "generation_config.json").read_text())["eos_token_id"] == ends


def test_the_loader_says_whether_targets_are_masked(chat_data):
    loader = Loader(Shards.open(chat_data / "data"), 4, 32, seed=1)
    _, targets = loader.next()
    assert loader.masked and (targets == IGNORE).any() and (targets != IGNORE).any()


def test_a_document_mask_that_would_cut_conversations_is_refused(plain, chat_data, tmp_path):
    source = write_chats(tmp_path / "chats.jsonl", chats(60))
    corpus = Conversations.find([source], ChatTemplate(plain, PLAIN_TEMPLATE))
    pack(corpus, plain, tmp_path / "data", validation_fraction=0.1)
    model = str(chat_data / "model.json")
    common = {"model": model, "steps": 1, "batch_size": 1, "device": "cpu", "document_mask": True}
    with pytest.raises(UserError, match="--document-mask would cut the conversations"):
        pretrain(TrainConfig(data=tmp_path / "data", out=tmp_path / "run", **common))
    assert not (tmp_path / "run").exists()
    pretrain(TrainConfig(data=chat_data / "data", out=tmp_path / "whole", **common))  # they end once


@pytest.fixture(scope="module")
def talker(chat_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("talker") / "run"
    model, data = str(chat_data / "model.json"), chat_data / "data"
    pretrain(TrainConfig(model=model, data=data, steps=2, batch_size=2, device="cpu", out=run))
    return run


def say(monkeypatch, capsys, text, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    code = call(["chat", *map(str, words), "--device", "cpu"])
    return code, capsys.readouterr()


def test_chat_answers_each_line_and_begins_anew(talker, monkeypatch, capsys):
    lines = "the ant?\n\n/new\nthe ant?\n/exit\nnever\n"
    code, printed = say(monkeypatch, capsys, lines, talker, "--max-new-tokens", 8, "--temperature", 0)
    half = len(printed.out) // 2
    assert code == 0 and half > 1 and printed.out[:half] == printed.out[half:]


def test_chat_forgets_what_no_longer_fits(talker, monkeypatch, capsys):
    lines = "the ant carries a leaf?\n" * 4
    code, printed = say(monkeypatch, capsys, lines, talker, "--max-new-tokens", 4)
    assert code == 0 and "no longer fits" in printed.err
    code, printed = say(monkeypatch, capsys, "ant " * 80 + "\n", talker)
    assert code == 2 and "too long for the model's context of 64 tokens" in printed.err


def test_chat_ends_a_reply_at_the_templates_end(talker, monkeypatch, capsys, chatml):
    bias = chatml.vocab["<|im_end|>"]
    original = Ant.forward

    def only_ends(self, *arguments, **named):
        logits = original(self, *arguments, **named)
        logits[..., bias] = 1e4
        return logits

    monkeypatch.setattr(Ant, "forward", only_ends)
    code, printed = say(monkeypatch, capsys, "the ant?\n", talker)
    assert code == 0 and printed.out == "\n"


def test_chat_without_a_template_is_refused(plain, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} " + " ".join(WORDS)}) + "\n" for i in range(60)))
    pack(Corpus.open([text]), plain, tmp_path / "shards", validation_fraction=0.1)
    write_json(tmp_path / "model.json", MODEL.to_dict())
    run = tmp_path / "run"
    model = str(tmp_path / "model.json")
    pretrain(TrainConfig(model=model, data=tmp_path / "shards", steps=1, batch_size=1, device="cpu", out=run))
    code, printed = say(monkeypatch, capsys, "hello\n", run)
    assert code == 2 and "no chat template" in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "content, flags, what",
    [
        ('{"messages": [{"role": "user", "content": "a"}]}\n', (), "line 1: no message is the assistant's"),
        ('{"text": "a"}\n', (), "no column 'messages'"),
        ('{"talk": 3}\n', ("--text-column", "talk"), "not a list of messages"),
        ("[1]\n", (), "not a JSON object"),
        (None, (), "give .jsonl, .parquet or hf:"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', ("--filters", "repeats"), "filters"),
    ],
)
def test_packing_what_is_no_conversation_ends_with_one_line(chatml, tmp_path, capsys, content, flags, what):
    chatml.save(tmp_path / "tokenizer")
    source = tmp_path / ("a.txt" if content is None else "a.jsonl")
    source.write_text(content or "a text")
    words = [
        "data",
        "pack",
        source,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "out",
        "--chat",
        *flags,
    ]
    assert call([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert what in error and len([line for line in error.splitlines() if "error" in line]) == 1


def test_rows_that_are_no_conversation_are_left_out_and_counted(chatml, tmp_path):
    good = chats(30)
    source = write_chats(tmp_path / "chats.jsonl", [*good, [{"role": "user", "content": "<|im_end|>"}]])
    corpus = Conversations.find([source], ChatTemplate(chatml), on_error="skip")
    with pytest.warns(UserWarning, match="line 31: message 1 spells the control token"):
        meta = pack(corpus, chatml, tmp_path / "out", validation_fraction=0.1)
    assert meta["left_out"] == {"rows": 1}
    assert sum(split["documents"] for split in meta["splits"].values()) == len(good)
