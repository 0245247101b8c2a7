"""Where messages for people go."""

from rich.console import Console

from ant5m import torchrun


def stderr() -> Console:
    """For one-line messages and progress. Of several processes that work together only the first one
    speaks."""
    return Console(stderr=True, soft_wrap=True, highlight=False, quiet=torchrun.rank() > 0)
