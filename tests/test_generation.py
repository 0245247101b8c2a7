"""Generation draws what transformers would draw, row by row, and knows a loop when it sees one."""

import copy
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

from ant5m.data.shards import Shards, Tokens
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import evaluate
from ant5m.eval.scoring import Request, score
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.model.generation import Sampling, draw, find_loops, generate, process
from ant5m.model.huggingface import config_to_huggingface

CORPUS = Path(__file__).parents[2] / "shared" / "data" / "corpus"
TEXT = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
PROMPTS = ["the ant", "by", "ants follow it to the nest by the old tree and along the path", "leaf", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = TEXT.split()
    return train_tokenizer([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20, vocab_size=300)


@pytest.fixture(scope="module")
def net() -> Ant:
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    return Ant(config)


def theirs(sampling: Sampling) -> logits_process.LogitsProcessorList:
    steps: list = []
    if sampling.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        steps.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            steps.append(logits_process.TopKLogitsWarper(sampling.top_k))
        steps.append(logits_process.TopPLogitsWarper(sampling.top_p))
    return logits_process.LogitsProcessorList(steps)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7),
        Sampling(temperature=0, repetition_penalty=1.4),
        Sampling(temperature=1.0, repetition_penalty=0.8),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=5_000),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(sampling):
    torch.manual_seed(0)
    logits, past = 3 * torch.randn(4, 100), torch.randint(0, 100, (4, 30))
    seen = torch.zeros(4, 100, dtype=torch.bool).scatter(1, past, True)
    expected = theirs(sampling)(past, logits.clone())
    torch.testing.assert_close(process(logits, seen, sampling), expected, rtol=1e-6, atol=1e-6)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, 2.0]]).expand(10_000, 5)
    chance = torch.arange(10_000) / 10_000
    drawn = draw(logits, torch.zeros(10_000, 5, dtype=torch.bool), Sampling(temperature=1.0), chance)
    share = torch.bincount(drawn, minlength=5) / 10_000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=2e-4, rtol=0)
    assert share[0] == share[2] == 0


def test_greedy_equals_recomputing_everything(net, tokenizer):
    for prompt in PROMPTS[:3]:
        ids = tokenizer.encode(prompt)
        for _ in range(30):
            with torch.inference_mode():
                ids.append(net(torch.tensor([ids]))[0, -1].argmax().item())
        expected = tokenizer.decode(ids[len(tokenizer.encode(prompt)) :])
        assert generate(net, tokenizer, [prompt], 30, temperature=0, repetition_penalty=1) == [expected]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_equals_transformers(net, tokenizer, penalty):
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config_to_huggingface(net.config, 0))
    ).eval()
    llama.load_state_dict({**net.state_dict(), "lm_head.weight": net.head_weight})
    for prompt in PROMPTS[:3]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        text = tokenizer.decode(output[0, ids.shape[1] :]).split(tokenizer.eos_token)[0]
        ours = generate(net, tokenizer, [prompt], 30, temperature=0, repetition_penalty=penalty)
        assert ours == [text]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_text_does_not_depend_on_its_batch(net, tokenizer, temperature):
    together = generate(net, tokenizer, PROMPTS, max_new_tokens=20, temperature=temperature, top_k=50, seed=5)
    alone = [
        generate(
            net, tokenizer, [prompt], max_new_tokens=20, temperature=temperature, top_k=50, seed=5 + row
        )[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert generate(net, tokenizer, []) == []


def test_seeds_decide(net, tokenizer):
    first, again, other = (
        generate(net, tokenizer, ["the ant"], 20, temperature=2.0, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other


def only_says(net: Ant, token: int) -> Ant:
    """A copy in which `token` is the most likely one whatever came before."""
    copy = Ant(ModelConfig(**{**net.config.to_dict(), "tie_word_embeddings": False}))
    copy.load_state_dict({**net.state_dict(), "lm_head.weight": torch.zeros_like(net.head_weight)})
    with torch.no_grad():
        copy.model.embed_tokens.weight.fill_(1)
        for layer in copy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        copy.lm_head.weight[token] = 1
    return copy


def test_where_a_text_ends(net, tokenizer):
    silent = only_says(net, tokenizer.eos_token_id)
    assert generate(silent, tokenizer, PROMPTS, temperature=0) == [""] * len(PROMPTS)
    tokens: list[tuple[int, int]] = []
    endless = only_says(net, 100)
    assert endless.training
    texts = generate(
        endless, tokenizer, PROMPTS[:3], 500, temperature=0, on_token=lambda *token: tokens.append(token)
    )
    assert endless.training
    for row, prompt in enumerate(PROMPTS[:3]):
        written = [token for number, token in tokens if number == row]
        assert len(written) == 64 - len(tokenizer.encode(prompt))  # the context is full
        assert texts[row] == tokenizer.decode(written)
    assert generate(endless, tokenizer, ["the ant"], 1, temperature=0) == [tokenizer.decode([100])]


def test_a_padded_table_generates_too(net, tokenizer):
    assert generate(only_says(net, 299), tokenizer, ["the"], 3, temperature=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1.0},
        {"temperature": 1e-40},
        {"repetition_penalty": 1e-40},
        {"seed": 2**64},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_impossible_values(net, tokenizer, arguments):
    with pytest.raises(UserError):
        generate(net, tokenizer, ["the ant"], **arguments)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_whose_products_overflow_writes_nothing(net, tokenizer, temperature):
    broken = copy.deepcopy(net)
    broken.model.norm.weight.data.fill_(1e38)
    with pytest.raises(UserError, match="computes NaN or infinity"):
        generate(broken, tokenizer, ["the", "ant"], max_new_tokens=3, temperature=temperature)
    with pytest.raises(UserError, match="computes NaN or infinity"):
        score(broken, [Request([1, 2], [3])])
    with pytest.raises(UserError, match="computes NaN or infinity"):
        evaluate(broken, in_memory(np.arange(200)))


def in_memory(tokens):
    counts = {"documents": 1, "tokens": len(tokens), "bytes": 400, "words": 1}
    meta = {"eos_token_id": 0, "splits": {"validation": counts}}
    return Shards(Path("memory"), "validation", meta, Tokens([tokens.astype(np.uint16)]))


def test_a_prompt_that_fills_the_context(net, tokenizer):
    with pytest.raises(UserError, match="no room in the model's context of 64"):
        generate(net, tokenizer, ["ant " * 64])


HUMAN = """Ants are found on almost every piece of land. They live in colonies that range from a few
dozen individuals in small natural cavities to highly organised cities of millions. Most of them are
workers, which look after the young, search for food, and defend the nest. A worker that has found food
lays a trail of scent on the way home; others follow it, and strengthen it in turn when they come back
loaded. When the food is exhausted no new marks are made, and the scent slowly disappears. This behavior
helps them deal with changes around them: when an obstacle blocks the path, the foragers leave it to
explore new routes, and the shorter of two ways wins because its marks are renewed more often. "Who told
you that?" asked the boy. "My father," she said, "and he saw it." """


def test_people_do_not_loop():
    report = find_loops(HUMAN)
    assert not report.looping and report.advice == "" and report.repeated[4] < 0.05
    assert not find_loops("No, no, no! Ha ha ha ha! Very, very good ...").looping
    assert not find_loops("").looping and not find_loops("ant").looping


@pytest.mark.parametrize(
    "loop",
    [
        "the ",
        "the ant and the leaf and ",
        "He went to the city of the sea. ",
        "www.example.com/",
        "a",
        "\n- item\n",
        "and then he said that she had been told to go home, because it was late in the evening. ",
    ],
)
def test_loops_are_found_and_advised_on(loop):
    prefix = " ".join(HUMAN.split()[:60]) + " "
    text = prefix + loop * (1 + 600 // len(loop))
    report = find_loops(text)
    assert report.looping
    assert report.times >= 4 and report.cycle_words > 40
    assert report.advice.count("\n") == 0
    assert "repetition penalty" in report.advice and "train longer" in report.advice


def test_the_longest_cycle_is_named():
    report = find_loops("one two three four " + "red blue " * 9 + "green green green end")
    assert (report.cycle, report.times, report.cycle_words) == ("red blue", 9, 18)
    assert report.repeated[1] == pytest.approx(1 - 8 / 26)


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus is not there")
def test_few_human_texts_are_taken_for_loops():
    flagged = total = 0
    for file in (CORPUS / "openstax", CORPUS / "eltec_eng"):
        with lzma.open(sorted(file.glob("*.jsonl.xz"))[0], "rt", encoding="utf-8") as lines:
            for _, line in zip(range(300), lines, strict=False):
                words = json.loads(line)["text"].split()[:200]
                total += 1
                flagged += find_loops(" ".join(words)).looping
    assert total >= 300 and flagged / total < 0.01
