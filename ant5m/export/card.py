"""The model card: what an exported model's README.md says about it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ant5m.data.shards import META, Meta
from ant5m.errors import UserError
from ant5m.eval.record import read_record
from ant5m.eval.results import TaskResult, recorded, section_of, weights_sha256
from ant5m.files import read_json
from ant5m.model.checkpoint import STATE, State
from ant5m.model.config import ModelConfig
from ant5m.model.generation import REPETITION_PENALTY, TEMPERATURE
from ant5m.model.run_file import RunFile, read_run_file

HELD_OUT_TEXT = "the held-out part of the same text"


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
    results: list[TaskResult] = field(default_factory=list)
    """what that section is about"""
    datasets: list[str] = field(default_factory=list)
    """OWNER/NAME on the Hugging Face hub of what it was trained on"""
    license: str | None = None
    """as the hub names it: apache-2.0"""
    language: str | None = None
    """ISO 639 code: en"""
    repo: str | None = None
    """OWNER/NAME on the hub"""
    base: str | None = None
    """the model that the training began with"""
    facts: dict[str, str] = field(default_factory=dict)
    """what else is known of the training, for a table: words and bytes seen, tokenizer, commit, ..."""

    def text(self, config: ModelConfig, num_parameters: int) -> str:
        """The card in Markdown, with the metadata block that the Hugging Face hub reads."""
        return _CARD.format(
            metadata=self._metadata("qwen3" if config.qk_norm else "llama"),
            name=self._title,
            parameters=f"{num_parameters:,}",
            architecture="Qwen3" if config.qk_norm else "Llama",
            shape=shape_of(config),
            training=self._training(),
            facts=self._facts(config, num_parameters),
            validation=self._validation(),
            tasks=self.tasks,
            samples=self._samples(),
            context=f"{config.max_position_embeddings:,}",
            place=self.repo or "PATH/TO/THIS/FOLDER",
            temperature=TEMPERATURE,
            penalty=REPETITION_PENALTY,
        )

    @property
    def _title(self) -> str:
        return " ".join(self.name.split()) or "A language model"

    def _metadata(self, architecture: str) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        loss_and_bits = ("loss", "bits_per_byte")
        measured = [("validation split", metric, self.validation.get(metric)) for metric in loss_and_bits]
        for result in self.results:
            measured += [(result.task, metric, value) for metric, (value, _) in result.metrics.items()]
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=data,
                metric_type=metric,
                metric_value=value,
            )
            for data, metric, value in measured
            if value is not None
        ]
        return ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["ant5m", architecture],
            license=self.license,
            language=self.language,
            datasets=self.datasets or None,
            model_name=self._title if results else None,
            eval_results=results or None,
        ).to_yaml(line_break="\n")

    def _training(self) -> str:
        tokens = f"{self.tokens:,} tokens" if self.tokens else "an unrecorded number of tokens"
        begin = f"with ant5m from {self.base}" if self.base else "from scratch with ant5m"
        return f"Trained {begin} on {tokens} of {self.data or 'text that was not recorded'}."

    def _facts(self, config: ModelConfig, num_parameters: int) -> str:
        tables = 1 if config.tie_word_embeddings else 2
        inner = num_parameters - tables * config.vocab_size * config.hidden_size
        parameters = {"parameters": f"{num_parameters:,}", "without token embeddings": f"{inner:,}"}
        rows = {**parameters, **self.facts}.items()
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])

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
        quoted = "\n\n".join(_fenced(f"{prompt}{text}") for prompt, text in self.samples)
        return f"## Samples\nAs they came, unselected; the prompt is the beginning of each.\n\n{quoted}\n\n"


def _fenced(text: str) -> str:
    """A block of code, whatever backticks the text has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def card_of_run(name: str, run: Path, checkpoint: Path) -> ModelCard:
    """What a run folder knows about one of its checkpoints: its data, tokens and evaluations.

    Raises `UserError` when a file of the run is missing or damaged.
    """
    file = read_run_file(run)
    if file is None:
        raise UserError(f"{run / 'config.json'} does not exist")
    state = read_json(checkpoint / STATE, State)
    measured = [
        one
        for one in read_record(run / "eval.json").get("perplexity", [])
        if one["checkpoint"] == checkpoint.name and one["held_out"]
    ]
    sources = [source for folder in file.shards_folders(run) for source in _sources(folder)]
    return ModelCard(
        name=name,
        data=_phrase(sources),
        datasets=[source.split(":")[1] for source in sources if source.startswith("hf:")],
        tokens=state.tokens,
        base=_base(file.train.init if file.train else None),
        facts=_facts_of_run(file, state),
        validation={**measured[-1], "text": HELD_OUT_TEXT} if measured else {},
        tasks=section_of(run, checkpoint),
        results=recorded(run / "eval.json", weights_sha256(checkpoint)),
    )


def _base(init: str | None) -> str | None:
    """The model that a run began with, without the folders around it."""
    return "/".join(Path(init).parts[-2:]) if init else None


def _facts_of_run(run: RunFile, state: State) -> dict[str, str]:
    """What a run's files say of how it was trained."""
    facts = {}
    counts, tokens = run.data.train, state.tokens
    if tokens and run.mixture:
        facts["tokens seen"] = f"{tokens:,}, of a mixture of {', '.join(run.mixture.sources)}"
    elif tokens and counts:
        facts["tokens seen"] = f"{tokens:,} ({tokens / counts.tokens:.2f} epochs)"
        # By their mean over the training text.
        facts["words seen"] = f"{round(tokens * counts.words / counts.tokens):,}"
        facts["bytes seen"] = f"{round(tokens * counts.bytes / counts.tokens):,}"
    size = ModelConfig.from_dict(state.model).vocab_size
    facts["tokenizer"] = f"{size:,} entries, sha256 {str(state.tokenizer)[:16]}"
    if run.ran.device:
        facts["hardware"] = run.ran.device
    if state.seconds:
        facts["hours of training"] = f"{state.seconds / 3600:.2f}"
    if run.versions.ant5m:
        commit = f", commit {run.versions.commit}" if run.versions.commit else ""
        facts["ant5m"] = f"{run.versions.ant5m}{commit}"
    return facts


def _sources(shards: Path) -> list[str]:
    """The texts that were packed, as they were named; none when the shards are gone."""
    if not (shards / META).exists():
        return []
    return [source.name for source in read_json(shards / META, Meta).sources]


def _phrase(sources: list[str]) -> str | None:
    """Their names for people, without folders."""
    if sources == ["builtin"]:
        return "docstrings and reference topics of the Python standard library and installed packages"
    shown = [name if name.startswith("hf:") else Path(name).name for name in sources[:5]]
    more = f" and {len(sources) - 5} more files" if len(sources) > 5 else ""
    return f"{', '.join(shown)}{more}" or None


def shape_of(config: ModelConfig) -> str:
    """The shape in one line, for people."""
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {heads} of {config.head_size} "
        f"dimensions, SwiGLU {config.intermediate_size}, {config.vocab_size:,} tokens "
        f"({'tied' if config.tie_word_embeddings else 'untied'})"
    )


_CARD = """\
---
{metadata}
---

# {name}

A language model of {parameters} parameters in the {architecture} architecture: {shape}.

## Training
{training}

{facts}

## Evaluation
{validation}

{tasks}{samples}## Limits
- A model of this size writes locally plausible text. It does not know facts, follow instructions or reason.
- It knows only the kind of text it was trained on, with that text's errors and biases; nothing was filtered
  for safety.
- The context is {context} tokens. Greedy decoding falls into loops: the defaults sample at temperature
  {temperature} with a repetition penalty of {penalty}.

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0]))
```

Batches are padded on the left with the end-of-text token, which needs no row of its own. Other engines:

```sh
ant5m generate "{place}" --prompt "Once upon a time"                # a local folder
mlx_lm.generate --model "{place}" --prompt "Once upon a time" --ignore-chat-template
vllm serve "{place}"
ant5m export "{place}" --format gguf                                # a local folder, for llama.cpp and Ollama
```
"""
