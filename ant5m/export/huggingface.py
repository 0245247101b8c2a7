"""A Hugging Face folder: a model trained here is a `LlamaForCausalLM` there, number for number."""

from pathlib import Path
from typing import Any

from ant5m.data.conversations import end_ids
from ant5m.data.tokenizer import Tokenizer
from ant5m.export.card import ModelCard
from ant5m.files import new_folder, write_file, write_json
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import check_tokenizer
from ant5m.model.generation import REPETITION_PENALTY, TEMPERATURE
from ant5m.model.huggingface import config_to_huggingface
from ant5m.model.weights import save_model


def export(net: Ant, tokenizer: Tokenizer, folder: Path, card: ModelCard) -> None:
    """Write a new Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` open offline.

    Raises `UserError` when `folder` exists, or when the tokenizer has more entries than the model.
    """
    check_tokenizer(tokenizer, net.config)
    bos, ends = tokenizer.bos_token_id, list(end_ids(tokenizer))
    eos = ends[0] if len(ends) == 1 else ends
    with new_folder(folder) as aside:
        write_json(aside / "config.json", config_to_huggingface(net.config, eos, bos))
        write_json(aside / "generation_config.json", _generation_config(tokenizer, eos))
        save_model(net, aside)
        tokenizer.save(aside, net.config.max_position_embeddings)
        write_file(
            aside / "README.md", card.text(net.config, sum(weight.numel() for weight in net.parameters()))
        )


def _generation_config(tokenizer: Tokenizer, eos: int | list[int]) -> dict[str, Any]:
    """The defaults of transformers' `generate`: those of `ant5m generate`, since greedy text loops."""
    pad = tokenizer.vocab.get(tokenizer.settings.get("pad_token", ""), tokenizer.eos_token_id)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": TEMPERATURE,
        "repetition_penalty": REPETITION_PENALTY,
    }
