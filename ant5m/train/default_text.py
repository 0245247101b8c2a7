"""The data of a run that was given none: the built-in English text, its tokenizer, and its shards.

Both lie in the run folder (`tokenizer/`, `data/`), so nothing is hidden in a cache, and a part that is there
already is not made again.
"""

from rich.console import Console
from rich.progress import Progress

from ant5m.data import builtin
from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.shards import META
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.train.run import Run

VALIDATION_FRACTION = 0.02


def pack_default_text(run: Run) -> None:
    """Make `run.tokenizer` and `run.shards`, where they are not there yet."""
    if (run.shards / META).exists():
        return
    with Progress(console=Console(stderr=True)) as progress:
        builtin.load_builtin(progress)
        corpus = Corpus.open(["builtin"])
        tokenizer = _tokenizer(run, corpus, progress)
        pack(corpus, tokenizer, run.shards, VALIDATION_FRACTION, progress=progress)


def _tokenizer(run: Run, corpus: Corpus, progress: Progress) -> Tokenizer:
    """The one of the run, the one that was given, or a new one with as many entries as the model has rows."""
    if run.has_tokenizer:
        return Tokenizer.load(run.tokenizer)
    if run.config.tokenizer is not None:
        tokenizer = Tokenizer.load(run.config.tokenizer)
    else:
        tokenizer = train_tokenizer(corpus.documents(), run.model.vocab_size, progress=progress)
    tokenizer.save(run.tokenizer, run.model.max_position_embeddings)
    return tokenizer
