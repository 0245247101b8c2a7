"""The fast path gives every request the score that it has alone, however much requests share."""

import pytest
import torch

from ant5m.errors import UserError
from ant5m.eval import scoring
from ant5m.eval.scoring import Request, pack_requests, score
from ant5m.kernels import dispatch, ops
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

CONTEXT = 24
CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def net() -> Ant:
    torch.manual_seed(0)
    return Ant(CONFIG)


def alone(net: Ant, request: Request) -> tuple[float, bool]:
    """One request through the whole model, as lm-eval's `hf` does it."""
    ids = torch.tensor([*request.context, *request.continuation])[-CONTEXT - 1 :]
    with torch.inference_mode():
        log_probs = net(ids[None, :-1])[0].log_softmax(-1)
    asked = len(request.continuation)
    wanted = ids[len(ids) - asked :]
    rows = log_probs[len(log_probs) - asked :]
    total = rows.gather(1, wanted[:, None]).sum().item()
    return total, bool((rows.argmax(-1) == wanted).all())


def draw(seed: int) -> list[Request]:
    """Requests that share contexts, share beginnings of answers, repeat, are too long."""
    random = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=random))
        return torch.randint(0, CONFIG.vocab_size, (size,), generator=random).tolist()

    requests = []
    for _ in range(12):
        context, stem = tokens(1, 20), tokens(1, 3)
        requests += [Request(context, stem + tokens(1, 8)) for _ in range(4)]
        requests += [Request(context, stem), Request(context[:1], [*stem, 1]), requests[-1]]
    return requests + [Request(tokens(60, 70), tokens(1, CONTEXT)) for _ in range(3)]


@pytest.mark.parametrize(
    ("pack", "batch", "head"), [(128, 2048, 256), (1, 1, 1), (40, 100, 7), (9999, 9999, 3)]
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_request_scores_as_it_does_alone(net, monkeypatch, backend, pack, batch, head):
    monkeypatch.setattr(dispatch, "_selected", backend)
    monkeypatch.setattr(scoring, "_pack_tokens", lambda device: pack)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", batch)
    monkeypatch.setattr(ops, "_LOGIT_ROWS", head)
    requests = draw(seed=pack)
    expected = [alone(net, request) for request in requests]
    found = score(net, requests)
    assert [one.log_likelihood for one in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]


def test_what_a_greedy_model_writes_is_greedy(net):
    ids = [3]
    with torch.inference_mode():
        for _ in range(5):
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    right, wrong = score(net, [Request(ids[:1], ids[1:]), Request(ids[:1], [*ids[1:-1], (ids[-1] + 1) % 50])])
    assert right.greedy and not wrong.greedy


def test_what_requests_share_is_computed_once():
    context = list(range(20))
    packs = list(pack_requests([Request(context, [30 + answer, 40]) for answer in range(4)], CONTEXT))
    assert sum(len(pack.ids) for pack in packs) == 20 + 4


def test_the_progress_counts_every_request_with_an_answer_once(net):
    requests = draw(seed=1)
    counts = list[int]()
    score(net, requests, counts.append)
    assert sum(counts) == len(requests)


def test_the_net_keeps_its_mode(net):
    net.train()
    score(net, [Request([1], [2])])
    assert net.training
    net.eval()


def test_an_answer_longer_than_the_context_is_refused(net):
    with pytest.raises(UserError, match=f"answer of {CONTEXT + 1} tokens does not fit"):
        score(net, [Request([1], [2] * (CONTEXT + 1))])


def test_an_answer_without_tokens_is_refused(net):
    with pytest.raises(UserError, match="no tokens"):
        score(net, [Request([1], [2]), Request([1], [])])
