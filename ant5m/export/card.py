"""The model card: what an exported model's README.md says about it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ant5m.files import read_json
from ant5m.model.config import ModelConfig


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
