"""Loop statistics of models whose text is known in advance."""

import numpy as np
import pytest
import torch

from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval import loops
from ant5m.eval.perplexity import encode_texts
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.model.generation import find_loops

TEXT = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20, vocab_size=300)


def successor_net(successor: list[int], context: int = 128) -> Ant:
    """A model that always writes `successor[token]` after `token`: its layers add nothing."""
    config = ModelConfig(
        vocab_size=len(successor),
        hidden_size=len(successor),
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    net = Ant(config)
    with torch.no_grad():
        net.model.layers[0].self_attn.o_proj.weight.zero_()
        net.model.layers[0].mlp.down_proj.weight.zero_()
        table = torch.eye(len(successor))
        net.model.embed_tokens.weight.copy_(table)
        net.lm_head.weight.zero_()
        net.lm_head.weight[successor] = table
    return net


def words_in_a_ring(tokenizer, words):
    """token -> the next of the words, each word being one token; all other tokens lead to the first."""
    ids = [tokenizer.encode(" " + word) for word in words]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(ids)
    successor = list(np.random.default_rng(0).permutation(tokenizer.vocab_size))
    ring = [one[0] for one in ids]
    for token, following in zip(ring, ring[1:] + ring[:1], strict=True):
        other = successor.index(following)
        successor[other], successor[token] = successor[token], following
    return successor


def test_a_ring_of_words_is_a_loop_from_its_beginning(tokenizer):
    net = successor_net(words_in_a_ring(tokenizer, ["ant", "leaf", "path"]))
    found = loops.measure_loops(net, tokenizer, [" ant", " leaf", " ant leaf path"], max_new_tokens=90)
    assert found.looping == found.texts == 3 and found.loop_rate == 1
    assert found.interval[1] == 1 and 0.3 < found.interval[0] < 0.5
    assert found.repeated[1] == pytest.approx(1 - 3 / 90) and found.repeated[3] == pytest.approx(1 - 3 / 88)
    assert found.distinct[1] == pytest.approx(3 / 270)
    assert found.first_loop == loops.EVERY and found.ended == 0
    assert set(found.longest.cycle.split()) == {"ant", "leaf", "path"} and found.longest.words == 90


def test_a_text_that_never_comes_back_is_none(tokenizer):
    flat = successor_net(list(range(tokenizer.vocab_size)))
    torch.nn.init.zeros_(flat.lm_head.weight)
    found = loops.measure_loops(flat, tokenizer, ["the ant", "a leaf"], "sampled at 1.0", max_new_tokens=90)
    assert found.looping == 0 and found.longest is None and found.first_loop is None
    assert found.repeated[4] < 0.1 and found.distinct[4] > 0.9


def test_a_penalty_breaks_the_ring(tokenizer):
    net = successor_net(words_in_a_ring(tokenizer, ["ant", "leaf", "path"]))
    with torch.no_grad():  # every token gets a second choice, nearly as likely
        net.lm_head.weight += 0.9 * net.lm_head.weight.roll(7, 0)
    found = loops.measure_loops(net, tokenizer, [" ant"], "greedy, penalty 1.2", max_new_tokens=60)
    free = loops.measure_loops(net, tokenizer, [" ant"], "greedy", max_new_tokens=60)
    assert free.looping and not found.looping and found.repeated[2] < free.repeated[2]


def test_texts_that_end_are_counted(tokenizer):
    end = tokenizer.eos_token_id
    net = successor_net([end] * tokenizer.vocab_size)
    with torch.no_grad():  # whatever comes, the end
        net.model.embed_tokens.weight.copy_(
            net.model.embed_tokens.weight[:1].expand(tokenizer.vocab_size, -1)
        )
        net.lm_head.weight.zero_()
        net.lm_head.weight[end] = net.model.embed_tokens.weight[0]
    found = loops.measure_loops(net, tokenizer, ["the ant", "a"], max_new_tokens=20)
    assert found.ended == 1 and found.looping == 0


def test_a_full_context_is_no_end(tokenizer):
    net = successor_net(words_in_a_ring(tokenizer, ["ant", "leaf"]), context=16)
    assert loops.measure_loops(net, tokenizer, [" ant", " ant leaf"], max_new_tokens=50).ended == 0


def test_batches_and_threads_change_nothing(tokenizer):
    flat = successor_net(list(range(tokenizer.vocab_size)))
    torch.nn.init.zeros_(flat.lm_head.weight)
    prompts, threads = list(loops.PROMPTS[:9]), torch.get_num_threads()
    done = []
    one = loops.measure_loops(
        flat, tokenizer, prompts, "sampled at 0.8", 40, batch_size=2, advance=done.append
    )
    other = loops.measure_loops(flat, tokenizer, prompts, "sampled at 0.8", 40, batch_size=64)
    assert one == other and done == [2, 2, 2, 2, 1]
    assert torch.get_num_threads() == threads and flat.training


def test_prompts_of_documents(tokenizer):
    text = " ".join(WORDS)
    shards = encode_texts_of([text, "a", text[8:], text[4:]], tokenizer)
    prompts = loops.validation_prompts(shards, tokenizer, count=10, tokens=6)
    assert prompts == [tokenizer.decode(tokenizer.encode(one)[:6]) for one in (text, text[8:], text[4:])]
    assert loops.validation_prompts(shards, tokenizer, count=2, tokens=6) == [prompts[0], prompts[2]]
    assert loops.validation_prompts(shards, tokenizer, count=2, tokens=600) == []


def encode_texts_of(texts, tokenizer):
    class Texts:
        def documents(self):
            return iter(texts)

    return encode_texts(Texts(), tokenizer)


def test_peoples_text_for_comparison(tokenizer):
    story, ring = tokenizer.encode(" ".join(WORDS)), tokenizer.encode(" leaf path" * 30)
    found = loops.text_loops(tokenizer, [story, ring], 60)
    assert found.looping == 1 and found.longest.cycle in ("leaf path", "path leaf")


def test_the_built_in_prompts():
    assert len(loops.PROMPTS) == len(set(loops.PROMPTS)) >= 50
    assert not find_loops(" ".join(loops.PROMPTS)).looping


def test_bad_input(tokenizer):
    net = successor_net(list(range(tokenizer.vocab_size)))
    with pytest.raises(UserError, match="no decoding 'beam'"):
        loops.measure_loops(net, tokenizer, decoding="beam")
    with pytest.raises(UserError, match="at least one"):
        loops.measure_loops(net, tokenizer, [])
