"""Pages that MkDocs takes from elsewhere in the repository, so that each text exists once.

`reference/commands.md` is made from the `--help` of every command; the overview, the contributing guide and
the changelog are the files in the repository's root, and the notebooks, which the overview links, go along.
"""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Its warnings are about code that it reads without running it; an object that is missing is an error anyway.
logging.getLogger("mkdocs.plugins.griffe").setLevel(logging.ERROR)

WIDE = "1000"  # columns: every flag and its text on one line


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=for_the_site((ROOT / source).read_text("utf-8"))))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.name}", content=notebook.read_bytes()))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of docs/ to a file of the root lead to its page."""
    for page, source in FROM_ROOT.items():
        markdown = re.sub(rf"\]\(((?:\.\./)*)\.\./{source}", rf"](\g<1>{page}", markdown)
    return markdown


def for_the_site(text: str) -> str:
    """A file of the root with its links as seen from docs/."""
    text = text.replace("](docs/", "](")
    for page, source in FROM_ROOT.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text


def commands_page() -> str:
    """Markdown with a section for every command."""
    from ant5m.cli import COMMANDS

    sections = [section(name, help_of(name)) for name in COMMANDS]
    head = (
        "# Commands\n\nMade from each command's own `--help`. Every command exits with 0 when it is done, "
        "with 2 on bad input (one line says what to do), with 130 when it was interrupted.\n"
    )
    return "\n".join([head, *sections])


def help_of(name: str) -> str:
    """What `ant5m NAME --help` prints on a very wide terminal."""
    environment = {**os.environ, "COLUMNS": WIDE, "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", "from ant5m.cli import main; main()", *name.split(), "--help"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout


def section(name: str, page: str) -> str:
    """The Markdown for one help page: usage, description, examples, a table of flags."""
    usage, rest = page.split("\n", 1)
    description, _, boxes = rest.partition("╭")
    examples = re.findall(r"^ +(ant5m.*)$", description, re.MULTILINE)
    prose = "\n".join(line.strip() for line in description.splitlines() if line.strip() not in examples)
    prose = re.sub(r"\n{2,}", "\n\n", re.sub(r"^(Examples|For example):$", "", prose, flags=re.MULTILINE))
    rows = [f"| `{flag}` | {cell(text)} |" for flag, text in flags_of(boxes)]
    parts = [
        f"## ant5m {name}",
        f"```text\n{usage.removeprefix('usage: ').replace(' [-h]', '')}\n```",
        prose.strip(),
    ]
    parts += [
        "```sh\n" + "\n".join(examples) + "\n```",
        "| flag | what it does |\n| --- | --- |\n" + "\n".join(rows),
    ]
    return "\n\n".join(parts) + "\n"


def flags_of(boxes: str) -> list[tuple[str, str]]:
    """(flag with its value, text) of each row in the boxes of a help page."""
    rows: list[tuple[str, str]] = []
    for line in boxes.splitlines():
        inside = line.strip("│").rstrip()
        if not line.startswith("│") or not inside:
            continue
        if inside.startswith("  "):  # goes on with the row above
            flag, text = rows.pop()
            rows.append((flag, f"{text} {inside.strip()}".strip()))
            continue
        flag, _, text = inside.strip().partition("  ")
        rows.append((flag, text.strip()))
    return [(flag, text) for flag, text in rows if not flag.startswith("-h")]


def cell(text: str) -> str:
    """Text for a table cell; only what stands in backticks is Markdown."""
    text = text.replace("<", "&lt;").replace("|", r"\|")
    return text if "`" in text else re.sub(r"([*_\[\]])", r"\\\1", text)
