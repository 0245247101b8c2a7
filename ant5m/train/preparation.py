"""The shards that a run trains on, made first where it was given text, or nothing.

Shards and tokenizer of a given text lie in a cache beside the run folder, where the next run finds them;
those of the built-in text in the run folder itself (`tokenizer/`, `data/`). A part that is there already is
not made again.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ant5m.console import stderr
from ant5m.data import builtin, cache
from ant5m.data.cache import Cache
from ant5m.data.corpus import Corpus
from ant5m.data.mixture import Mixture, is_mixture
from ant5m.data.packing import pack
from ant5m.data.shards import META, PROGRESS, Shards
from ant5m.data.tokenizer import Tokenizer, VocabularyTooLarge, train_tokenizer
from ant5m.errors import UserError
from ant5m.model.checkpoint import check_tokenizer
from ant5m.model.config import PRESETS
from ant5m.model.costs import count_parameters
from ant5m.train.config import TrainConfig
from ant5m.train.run import Run

DEFAULT_VALIDATION_FRACTION = 0.02
"""of the built-in text"""
UNUSED = 1 / 3
"""of a model's table: a default model with more rows that no token uses is refused"""


def prepare(run: Run, model_chosen: bool = True) -> None:
    """Make the run's shards and their tokenizer, and set `run.packed` or `run.mixture`. `model_chosen`: by
    somebody, not by default.

    Raises `UserError` where the text, the tokenizer and the model do not fit each other.
    """
    if run.mixture is not None or (run.packed is not None and (run.packed / META).exists()):
        return
    if run.config.tokenizer and not run.has_tokenizer:
        tokenizer = Tokenizer.load(run.config.tokenizer)
        if run.initial is None:  # else rows are added
            check_tokenizer(tokenizer, run.model)
        if not model_chosen:
            _check_default_model(run, tokenizer.vocab_size, run.config.tokenizer)
    if not run.config.data:
        _refuse_limits(run.config, "the built-in text")
        _pack_default_text(run)
    elif any(map(is_mixture, run.config.data)):
        run.mixture = _prepare_mixture(run)
        if not model_chosen:
            first = Path(run.mixture.data[0])
            _check_default_model(run, Shards.open(first, verify=False).vocab_size, first)
    elif _is_packed(run.config.data):
        run.packed = Path(run.config.data[0])
        _refuse_limits(run.config, f"{run.packed}")
        if not model_chosen:
            _check_default_model(run, Shards.open(run.packed, verify=False).vocab_size, run.packed)
    else:
        run.packed = _pack_given_text(run)


def _check_default_model(run: Run, entries: int, where: Path) -> None:
    """Raise `UserError` where the model that nobody chose has many rows that the tokenizer never uses."""
    rows = run.model.vocab_size
    if entries >= rows * (1 - UNUSED):
        return
    fitting = _nearest_preset(run, entries, round(entries / (1 - UNUSED)))
    raise UserError(
        f"{where} has a vocabulary of {entries:,} entries, the default model {run.config.model} {rows:,} "
        f"rows, of which {rows - entries:,} would never be used: "
        + (f"take --model {fitting}" if fitting else "choose a --model with as many rows")
    )


def _prepare_mixture(run: Run) -> Mixture:
    """The mixture with a folder of shards for each source, made first for those that are text."""
    if len(run.config.data) > 1:
        raise UserError(f"--data takes one mixture, alone, not {', '.join(run.config.data)}")
    if run.config.checkpoint_words:
        raise UserError("--checkpoint-words counts the words of one text: leave it out with a mixture")
    mixture = Mixture.read(Path(run.config.data[0]))
    packed = [data for data in mixture.data if _is_packed((data,))]
    texts = {data: _open(run, [data]) for data in mixture.data if data not in packed}
    if packed:
        Shards.join([Shards.open(folder, verify=False) for folder in packed])  # one tokenizer?
    if not texts:
        _refuse_limits(run.config, "the shards of the mixture")
    else:
        packs = _pack_texts(run, list(texts.values()), Path(packed[0]) / "tokenizer" if packed else None)
        made = dict(zip(texts, packs, strict=True))
        mixture = mixture.at([str(made.get(data, data)) for data in mixture.data])
    return mixture


def _is_packed(names: tuple[str, ...]) -> bool:
    """Whether the data are one folder of shards, finished or not."""
    return len(names) == 1 and any((Path(names[0]) / file).exists() for file in (META, PROGRESS))


def _pack_given_text(run: Run) -> Path:
    return _pack_texts(run, [_open(run, run.config.data)])[0]


def _open(run: Run, names: Sequence[str]) -> Corpus:
    config = run.config
    corpus = Corpus.open(names, config.text_column)
    return dataclasses.replace(corpus, max_documents=config.max_documents, group_column=config.group_column)


def _refuse_limits(config: TrainConfig, where: str) -> None:
    for name in ("max_documents", "max_tokens", "group_column"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for text that is yet to be packed, unlike {where}"
            )


def _pack_texts(run: Run, texts: Sequence[Corpus], packed: Path | None = None) -> list[Path]:
    """A folder of shards for each text, all with one tokenizer: where there is none yet, not even `packed`
    with other text, it is learned from all of them."""
    corpus = dataclasses.replace(texts[0], sources=tuple(source for text in texts for source in text.sources))
    made = Cache(run.folder.parent / cache.NAME)
    size = f", {corpus.size / 1e6:,.1f} MB" if corpus.size else ""
    count = f"{len(corpus.sources):,} source{'s' * (len(corpus.sources) != 1)}"
    stderr().print(f"text: {count}{size}; tokenizer and shards are kept in {made.folder}", markup=False)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            tokenizer = _tokenizer(run, made, corpus, progress, packed)
            return [made.shards(text, tokenizer, progress, run.config.max_tokens) for text in texts]
    finally:
        with contextlib.suppress(OSError):
            made.folder.rmdir()  # where nothing was made


def _tokenizer(run: Run, made: Cache, corpus: Corpus, progress: Progress, packed: Path | None) -> Tokenizer:
    """The one that was given, that of the model to begin with, the one of packed text, or a new one."""
    if run.config.tokenizer is None and run.initial is not None:
        return run.initial.tokenizer
    return Tokenizer.load(run.config.tokenizer or packed or _learned(run, made, corpus, progress))


def _learned(run: Run, made: Cache, corpus: Corpus, progress: Progress) -> Path:
    try:
        return made.tokenizer(corpus, run.model.vocab_size, progress, run.config.max_tokens)
    except VocabularyTooLarge as error:
        fitting = _nearest_preset(run, 0, error.supported)
        remedy = f"take --model {fitting}, or give more text" if fitting else "give more text"
        raise UserError(
            f"the text supports a vocabulary of only {error.supported:,} entries, {run.config.model} has "
            f"{run.model.vocab_size:,} rows: {remedy}"
        ) from None


def _nearest_preset(run: Run, least: int, most: int) -> str | None:
    """The preset with so many rows that has most nearly as many parameters as the run's model."""
    size = sum(count_parameters(run.model).values())
    distances = {
        name: abs(sum(count_parameters(preset).values()) - size)
        for name, preset in PRESETS.items()
        if least <= preset.vocab_size <= most
    }
    return min(distances, key=distances.__getitem__, default=None)


def _pack_default_text(run: Run) -> None:
    """Make `run.tokenizer` and `run.shards` of the built-in text."""
    run.claim()
    run.write()
    if (run.shards / META).exists():
        return
    with Progress(console=Console(stderr=True)) as progress:
        builtin.load_builtin(progress)
        corpus = Corpus.open(["builtin"])
        tokenizer = _default_tokenizer(run, corpus, progress)
        pack(corpus, tokenizer, run.shards, DEFAULT_VALIDATION_FRACTION, progress=progress)


def _default_tokenizer(run: Run, corpus: Corpus, progress: Progress) -> Tokenizer:
    """The one of the run, the one that was given, or a new one with as many entries as the model has rows."""
    if run.has_tokenizer:
        return Tokenizer.load(run.tokenizer)
    if run.config.tokenizer is not None:
        tokenizer = Tokenizer.load(run.config.tokenizer)
    elif run.initial is not None:
        tokenizer = run.initial.tokenizer
    else:
        tokenizer = train_tokenizer(corpus.documents(), run.model.vocab_size, progress=progress)
    tokenizer.save(run.tokenizer, run.model.max_position_embeddings)
    return tokenizer
