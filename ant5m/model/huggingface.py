"""Hugging Face folders, in and out: a model trained here is a `LlamaForCausalLM` there, number for number.

Neither direction needs transformers: a folder is JSON and safetensors, and only those are read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ant5m.errors import UserError
from ant5m.files import new_folder, read_json, write_file, write_json
from ant5m.model.config import ModelConfig

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.model.ant import Ant

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What LlamaConfig takes for a key that the file leaves out, where ModelConfig would take something else.
_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}

# key -> the values that mean "as in a plain Llama"; the first is what a missing key means.
_PLAIN = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}


def config_from_huggingface(values: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`.

    Reads the layouts of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). What has no
    place in `ModelConfig` and would change a logit (biases, another activation, RoPE scaling, quantized
    weights, own code) raises `UserError`; what only matters elsewhere (token ids, dropout, caching) is
    ignored.
    """
    if values.get("model_type") != "llama":
        raise UserError(f"model_type is {values.get('model_type')!r}: only 'llama' can be read")
    architectures = values.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise UserError(f"architectures is {architectures!r}: only ['LlamaForCausalLM'] can be read")
    for key, plain in _PLAIN.items():
        if values.get(key, plain[0]) not in plain:
            raise UserError(f"{key} is {values[key]!r}: only {plain[0]!r} can be read")
    known = {name: values[name] for name in ModelConfig.__dataclass_fields__ if name in values}
    known = {**_LLAMA_DEFAULTS, **known, "rope_theta": _rope_theta(values)}
    if known.get("num_key_value_heads") is None and "num_attention_heads" in known:
        known["num_key_value_heads"] = known["num_attention_heads"]
    return ModelConfig.from_dict(known)


def _rope_theta(values: dict[str, Any]) -> float:
    """The RoPE base, from whichever of the two layouts is there; `UserError` if RoPE is not the plain one."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{key} must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor") not in (1, None):
            raise UserError(f"{key} is {rope!r}: only plain RoPE can be read, without scaling")
    named = [values.get("rope_theta"), (values.get("rope_parameters") or {}).get("rope_theta")]
    bases = {base for base in named if base is not None}
    if len(bases) > 1:
        raise UserError(
            f"rope_theta is {named[0]!r} but rope_parameters says {named[1]!r}: which one is right?"
        )
    return bases.pop() if bases else 10_000.0


def config_to_huggingface(
    config: ModelConfig, eos_token_id: int, bos_token_id: int | None = None
) -> dict[str, Any]:
    """The `config.json` that transformers 4.56 and later open as a `LlamaForCausalLM`.

    RoPE stands there twice, as transformers 4 and 5 look for it. Without `bos_token_id` the end-of-text id
    also begins a text, as in the packed data. There is no `pad_token_id`: it would exclude that row of the
    table from fine-tuning.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config.to_dict(),
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "bos_token_id": eos_token_id if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
        "use_cache": True,
    }


def save_model(net: "Ant", folder: Path) -> None:
    """Write `folder/model.safetensors`: every weight once, in its own dtype, under its Hugging Face name."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def load_model(config: ModelConfig, folder: Path) -> "Ant":
    """An fp32 `Ant` on the CPU with the weights of a folder: one `model.safetensors` or shards with an index.

    Raises `UserError` when weights are missing, too many, of another shape, not numbers, or unreadable.
    """
    from ant5m.model.ant import Ant, rope_table

    weights = _read_weights(folder)
    if config.tie_word_embeddings:
        weights = _tied(weights, folder)
    with torch.device("meta"):  # nothing is drawn that would be thrown away
        net = Ant(config)
    expected = {name: tensor.shape for name, tensor in net.state_dict().items()}
    _check_names(set(expected), set(weights), folder)
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(
                f"{folder}: {name} is {tuple(weights[name].shape)}, its config says {tuple(shape)}: "
                "weights and config.json do not belong together"
            )
        if not weights[name].is_floating_point():
            raise UserError(
                f"{folder}: {name} is {weights[name].dtype}: only floating-point weights can be read"
            )
        if not torch.isfinite(weights[name].float()).all():
            raise UserError(
                f"{folder}: {name} holds NaN or infinity: the file is damaged or its training diverged"
            )
    # Copies: what was read may be the mapped file itself.
    net.load_state_dict({name: weights[name].to(torch.float32, copy=True) for name in expected}, assign=True)
    net.cos, net.sin = rope_table(config)
    return net


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        pickled = next(folder.glob("*.bin"), None)
        reason = f" ({pickled.name} may run code when loaded: convert it to safetensors)" if pickled else ""
        raise UserError(f"{folder} has no {WEIGHTS}{reason}")
    weights: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"{folder / name} is missing though {INDEX} names it") from None
        except SafetensorError as error:
            raise UserError(f"{folder / name} is damaged or not a safetensors file ({error})") from None
    # Buffers that old versions of transformers saved; they follow from the config.
    return {key: tensor for key, tensor in weights.items() if not key.endswith("rotary_emb.inv_freq")}


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of file names")
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise UserError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of that folder")
    return sorted(set(names.values()))


def _tied(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Leave one copy of a tied table, whichever of its two names (or both) the file uses."""
    head = weights.pop("lm_head.weight", None)
    if head is None:
        return weights
    table = weights.setdefault("model.embed_tokens.weight", head)
    if not torch.equal(table, head):
        raise UserError(
            f"{folder}: config.json ties the head to the token table, but lm_head.weight differs from it: "
            "set tie_word_embeddings to false if the head was trained apart"
        )
    return weights


def _check_names(expected: set[str], found: set[str], folder: Path) -> None:
    for what, names in (("lacks", expected - found), ("holds unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{folder} {what} {shown}: weights and config.json do not belong together")


@dataclass(frozen=True)
class ModelCard:
    """What an exported model's README.md says about it. Leave out what is not known: the card says so."""

    name: str
    data: str | None = None
    """what it was trained on, as a phrase: "37 MB of docstrings" """
    tokens: int | None = None
    """tokens seen in training"""
    validation: dict[str, Any] = field(default_factory=dict)
    """some of loss (nats per token), bits_per_byte, text (what they were measured on), as in eval.json"""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(prompt, continuation), unselected"""
    tasks: str = ""
    """section on 0-shot tasks in Markdown, ending with an empty line"""

    def text(self, config: ModelConfig, num_parameters: int) -> str:
        """The card in Markdown, with the metadata block that the Hugging Face hub reads."""
        return _CARD.format(
            name=self.name,
            parameters=f"{num_parameters:,}",
            shape=_shape(config),
            training=self._training(),
            validation=self._validation(),
            tasks=self.tasks,
            samples=self._samples(),
            context=f"{config.max_position_embeddings:,}",
        )

    def _training(self) -> str:
        tokens = f"{self.tokens:,} tokens" if self.tokens else "an unrecorded number of tokens"
        return f"Trained from scratch with ant5m on {tokens} of {self.data or 'text that was not recorded'}."

    def _validation(self) -> str:
        loss, bits = self.validation.get("loss"), self.validation.get("bits_per_byte")
        numbers = [f"loss {loss:.4f} nats per token"] if loss is not None else []
        numbers += [f"{bits:.4f} bits per byte"] if bits is not None else []
        if not numbers:
            return "No evaluation was recorded."
        return f"On {self.validation.get('text', 'held-out text')}: {', '.join(numbers)}. Measured by ant5m."

    def _samples(self) -> str:
        if not self.samples:
            return ""
        quoted = "\n\n".join(f"```text\n{prompt}{text}\n```" for prompt, text in self.samples)
        return f"## Samples\nAs they came, unselected; the prompt is the beginning of each.\n\n{quoted}\n\n"


def card_of_run(name: str, run: Path, checkpoint: Path) -> ModelCard:
    """What a run folder knows about one of its checkpoints: its data, its tokens, and its evaluation if any.

    Raises `UserError` when a file of the run is missing or damaged.
    """
    config, state = read_json(run / "config.json"), read_json(checkpoint / "state.json")
    evaluations = read_json(run / "eval.json").get("perplexity", []) if (run / "eval.json").exists() else []
    measured = [
        one for one in evaluations if one.get("checkpoint") == checkpoint.name and one.get("held_out")
    ]
    data = config.get("train", {}).get("data")
    return ModelCard(
        name=name,
        data=_sources(Path(data) if data else run / "data"),
        tokens=state.get("tokens"),
        validation={**measured[-1], "text": "the held-out part of the same text"} if measured else {},
    )


def _sources(shards: Path) -> str | None:
    """The names of the texts that were packed, without their folders; None when the shards are gone."""
    if not (shards / "meta.json").exists():
        return None
    names = [source["name"] for source in read_json(shards / "meta.json").get("sources", [])]
    if names == ["builtin"]:
        return "docstrings and reference topics of the Python standard library and installed packages"
    shown = [name if name.startswith("hf:") else Path(name).name for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more files" if len(names) > 5 else "")


def _shape(config: ModelConfig) -> str:
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {heads} of {config.head_size} "
        f"dimensions, SwiGLU {config.intermediate_size}, {config.vocab_size:,} tokens "
        f"({'tied' if config.tie_word_embeddings else 'untied'})"
    )


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [ant5m, llama]
---
# {name}

A language model of {parameters} parameters in the Llama architecture: {shape}.

## Training
{training}

## Evaluation
{validation}

{tasks}{samples}## Limits
- A model of this size writes locally plausible text. It does not know facts, follow instructions or reason.
- It knows only the kind of text it was trained on, with that text's errors and biases; nothing was filtered
  for safety.
- The context is {context} tokens. Greedy decoding falls into loops: sample, with a repetition penalty.

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8, repetition_penalty=1.1)
print(tokenizer.decode(output[0]))
```
"""


def export(net: "Ant", tokenizer: "Tokenizer", folder: Path, card: ModelCard) -> None:
    """Write a new Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` open offline.

    Raises `UserError` when `folder` exists, or when the tokenizer has more entries than the model.
    """
    check_tokenizer(tokenizer, net.config)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    with new_folder(folder) as aside:
        write_json(aside / "config.json", config_to_huggingface(net.config, eos, bos))
        write_json(aside / "generation_config.json", ids)
        save_model(net, aside)
        tokenizer.save(aside, net.config.max_position_embeddings)
        write_file(
            aside / "README.md", card.text(net.config, sum(weight.numel() for weight in net.parameters()))
        )


def check_tokenizer(tokenizer: "Tokenizer", config: ModelConfig) -> None:
    """Raise `UserError` when the tokenizer makes ids that the model has no row for.

    A model may have more rows than the tokenizer has entries: tables are often padded to a round number.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model {config.vocab_size:,}: "
            "they do not belong together (take a larger model, or a smaller tokenizer)"
        )
