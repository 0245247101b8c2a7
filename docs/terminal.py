"""A picture of a terminal as SVG: python docs/terminal.py OUT.svg [TITLE] < text with ANSI colors.

The text comes from a real terminal, for example `tmux capture-pane -e -p`.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

WIDTH = 90


def picture(ansi: str, title: str) -> str:
    """SVG that loads no font from another server."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(ansi.rstrip()))
    svg = console.export_svg(title=title, theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    out, *title = sys.argv[1:]
    Path(out).write_text(picture(sys.stdin.read(), " ".join(title) or "ant5m"), encoding="utf-8")
