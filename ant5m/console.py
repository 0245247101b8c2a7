"""Where messages for people go."""

from typing import TYPE_CHECKING

from rich.console import Console

from ant5m import torchrun

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def stderr() -> Console:
    """For one-line messages and progress. Of several processes that work together only the first one
    speaks."""
    return Console(stderr=True, soft_wrap=True, highlight=False, quiet=torchrun.rank() > 0)


def progress_bar(*columns: "ProgressColumn") -> "Progress":
    """Long work on stderr: its description, then `columns`; without any, a spinner and the time so far."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    spinner = () if columns else (SpinnerColumn(),)
    text = TextColumn("{task.description}", markup=False)
    return Progress(*spinner, text, *(columns or (TimeElapsedColumn(),)), console=stderr())
