"""lm-eval's view of a model: `ant5m` beside `hf`, with the same tokens, windows and conventions, but fast.

Importing this module registers the model, so that lm-eval itself can use it:

    import ant5m.eval.harness
    lm_eval.simple_evaluate(model="ant5m", model_args="pretrained=runs/my-run", tasks=["piqa"])
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ant5m.errors import UserError
from ant5m.eval.scoring import Request, Score, score
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import load_with_tokenizer

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer


@register_model("ant5m")
class AntLM(TemplateLM):
    """A model for lm-eval's likelihood tasks.

    Scores equal those of lm-eval's `hf` model on the exported folder: text is encoded as `transformers` does
    it, the end-of-text token stands where there is no context, long contexts lose their beginning. It does
    not generate.

    Args:
        pretrained: run folder, checkpoint or Hugging Face folder; or give `net` and `tokenizer`.
        device: as torch names it; default: the GPU if there is one. A given `net` stays where it is.
        batch_size, max_batch_size: lm-eval passes them; batches here are of so many tokens, not requests.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        net: Ant | None = None,
        tokenizer: "Tokenizer | None" = None,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if net is None or tokenizer is None:
            assert pretrained is not None, "give pretrained, or net and tokenizer"
            net, tokenizer = load_with_tokenizer(pretrained)
            net = net.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.net = net
        self.eos_token_id, self._bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        # `Tokenizer` takes text that spells a special token for text; transformers, and so lm-eval, does not.
        self._encoder = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._bos_token = tokenizer.bos_token
        self.ask: Callable[[Sequence[Request]], list[Score]] = functools.partial(score, net)
        """what scores requests"""
        self.rolling_tokens = 0
        """tokens that `loglikelihood_rolling` scored so far"""

    @property
    def eot_token_id(self) -> int:
        return self.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored behind, as lm-eval has it for `hf` models."""
        return self._bos_token_id

    @property
    def max_length(self) -> int:
        return self.net.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids as `transformers` makes them of an exported folder."""
        return self._encode_all([string], add_special_tokens)[string]

    def _encode_all(
        self, texts: Iterable[str], add_special_tokens: bool | None = None
    ) -> dict[str, list[int]]:
        """The ids of every text. Without a say on special tokens, a text that brings its own gets no more."""
        unique = list(dict.fromkeys(texts))
        if add_special_tokens is None:
            own = [text for text in unique if text.startswith(self._bos_token)]
            if own:
                rest = [text for text in unique if not text.startswith(self._bos_token)]
                return self._encode_all(own, False) | self._encode_all(rest, True)
            add_special_tokens = True
        rows = self._encoder.encode_batch_fast(unique, add_special_tokens=add_special_tokens)
        return {text: row.ids for text, row in zip(unique, rows, strict=True)}

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(one.log_likelihood, one.greedy) for one in self.ask(self.tokens(requests))]

    def tokens(self, requests: Sequence[Any]) -> list[Request]:
        """What lm-eval's requests of kind `loglikelihood` ask, in tokens."""
        pairs = [_spaces_moved(*request.args) for request in requests]
        behind = [(context, continuation) for context, continuation in pairs if context]
        texts = self._encode_all(text for context, rest in behind for text in (context, context + rest))
        alone = self._encode_all((continuation for context, continuation in pairs if not context), False)
        tokens = []
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if context:
                first, whole = texts[context], texts[context + continuation]
                answer = whole[len(first) :]
            else:
                first, answer = [self.prefix_token_id], alone[continuation]
                answer = answer[1:] if answer[:1] == first else answer
            if not answer:
                raise UserError(_no_tokens(request, continuation))
            tokens.append(Request(first, answer))
        return tokens

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        scores = self.ask([Request(context, continuation) for _, context, continuation in requests])
        return [(one.log_likelihood, one.greedy) for one in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Each text in windows of the model's context that do not overlap, the first behind the prefix."""
        texts = [request.args[0] for request in requests]
        ids = self._encode_all(texts)
        windows, text_ids = list[Request](), list[int]()
        for number, text in enumerate(texts):
            self.rolling_tokens += len(ids[text])
            for window in get_rolling_token_windows(ids[text], self.prefix_token_id, self.max_length, 1):
                windows.append(Request(*make_disjoint_window(window)))
                text_ids.append(number)
        totals = [0.0] * len(texts)
        for number, one in zip(text_ids, self.ask(windows), strict=True):
            totals[number] += one.log_likelihood
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("ant5m does not write texts for lm-eval: none of its tasks asks for them")


def _no_tokens(request: Any, continuation: str) -> str:
    """lm-eval's `hf` model fails an assertion here."""
    task, item, _ = getattr(request, "metadata", None) or (None, None, None)
    where = "" if task is None else f"{task}, item {item}: "
    return (
        f"{where}the answer {continuation!r} has no tokens of its own (it is empty, or this tokenizer merges "
        "it into the end of its context), so it cannot be scored: leave the item out, or the task"
    )


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the continuation, as in `TemplateLM._encode_pair`."""
    kept = len(context.rstrip())
    return context[:kept], context[kept:] + continuation
