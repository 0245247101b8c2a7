"""The text of a run that was given none."""

from ant5m.train.run import Run


def pack_default_text(run: Run) -> None:
    raise NotImplementedError
