"""The console program `ant5m`: finds the command, parses its flags, turns errors into exit codes.

Every command is a dataclass with a `run` method in a module of this package; its fields are the flags and its
docstring is the help text. Modules are imported only when their command is called, so `--help` stays fast.
"""

# ruff: noqa: E402  (what catches Ctrl-C during the imports comes before them)

import sys


def _interrupted_early(kind, error, traceback) -> None:
    """Ctrl-C while the modules below are imported is no error to show."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _interrupted_early

import ast
import dataclasses
import difflib
import errno
import functools
import importlib
import inspect
import io
import itertools
import os
import shutil
import textwrap
import typing
import warnings
from collections.abc import Callable
from types import NoneType

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ant5m
from ant5m.console import stderr
from ant5m.errors import DISK_FULL, PeerLost, UserError, on_one_line

# command -> ("module:Class", what it does)
COMMANDS = {
    "tokenizer train": ("ant5m.cli.tokenizer:TokenizerTrain", "train a byte-level BPE tokenizer on text"),
    "tokenizer health": (
        "ant5m.cli.tokenizer:TokenizerHealth",
        "check whether a tokenizer suits a text and a model",
    ),
    "data pack": ("ant5m.cli.data:DataPack", "turn text into token shards"),
    "data contamination": (
        "ant5m.cli.contamination:DataContamination",
        "check a training text for the items of benchmarks",
    ),
    "train": ("ant5m.cli.train:Train", "pre-train a model (with no flag: everything, on built-in text)"),
    "runs": ("ant5m.cli.runs:Runs", "list the runs, and draw their losses in one picture"),
    "average": ("ant5m.cli.average:Average", "average the weights of checkpoints"),
    "eval": (
        "ant5m.cli.evaluate:Evaluate",
        "loss, perplexities, bits per byte and 0-shot scores of a model",
    ),
    "autopsy": (
        "ant5m.cli.autopsy:AutopsyCommand",
        "examine a trained model: embeddings, heads, groups, loops",
    ),
    "generate": ("ant5m.cli.generate:Generate", "generate text with a model"),
    "chat": ("ant5m.cli.chat:Chat", "talk to a model that was trained on conversations"),
    "doctor": ("ant5m.cli.doctor:Doctor", "examine an architecture before training it"),
    "compare": ("ant5m.cli.compare:Compare", "a controlled experiment: models, seeds, intervals, verdicts"),
    "push": ("ant5m.cli.push:Push", "put a trained model on the Hugging Face hub"),
    "export": ("ant5m.cli.export:Export", "write a model for other programs: Hugging Face, GGUF, HTML"),
    "completion": ("ant5m.cli.completion:Completion", "let bash or zsh complete commands and flags"),
}

OK, PEER_LOST, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141  # 128 + SIGINT, 128 + SIGPIPE
NO_MEMORY = "not enough memory: use less text, a smaller model or smaller batches"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def main() -> None:
    """Entry point of `ant5m`."""
    sys.exit(call(sys.argv[1:]))


def main_train() -> None:
    """Entry point of `ant5m-train`, a direct name for `ant5m train`."""
    sys.exit(call(["train", *sys.argv[1:]], program="ant5m-train"))


def call(words: list[str], program: str | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    _print_in_any_encoding()
    if words == ["--version"]:
        print(f"ant5m {ant5m.__version__}")
        return OK
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        return _unknown(words)
    flags = words[len(name.split()) :]
    return guarded(lambda: _load(name, flags, program or f"ant5m {name}").run())


def guarded(action: Callable[[], object]) -> int:
    """Call `action`; errors that a user can mend become one line on stderr and an exit code."""
    warnings.showwarning = _warn
    try:
        action()
    except UserError as error:
        return _fail(str(error))
    except PeerLost as error:
        stderr().print(str(error), markup=False)
        return PEER_LOST
    except KeyboardInterrupt:
        stderr().print("interrupted", style="yellow")
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads what we print has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has somewhere to go
        return BROKEN_PIPE
    except MemoryError:
        return _fail(NO_MEMORY)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch says it
            raise
        return _fail(NO_MEMORY)
    except OSError as error:
        if error.errno in DISK_FULL:
            what = error.filename or "a file"
            return _fail(f"no room left on the disk while writing {what}: free some and run again")
        if error.strerror is None:  # raised by a library, not by the system
            raise
        remedy = ": name another place, or make it writable" if error.errno in NOT_WRITABLE else ""
        return _fail(f"{error.filename or 'a file or the network'}: {error.strerror}{remedy}")
    return OK


def _print_in_any_encoding() -> None:
    """Escape what a terminal or pipe cannot show (Latin-1, ASCII, file names that are not UTF-8)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def load_command(name: str) -> typing.Any:
    """The dataclass of a command."""
    module, _, cls = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), cls)


def _load(name: str, flags: list[str], program: str):
    command = load_command(name)
    # A command may find what stands for the flags that are not given, as `ant5m train --config` does.
    defaults = {"default": command.defaults(flags)} if hasattr(command, "defaults") else {}
    _improve_help(command)
    # tyro would drop the examples at the end of the docstring, and give every switch a --no- twin.
    return tyro.cli(
        command,
        args=flags,
        prog=program,
        description=_wrapped(inspect.cleandoc(command.__doc__ or "")),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        **defaults,
    )


def _wrapped(text: str) -> str:
    """Paragraphs in lines of the terminal's width; what is indented stays as it is. A space begins each line,
    or tyro would join them again."""
    width = shutil.get_terminal_size().columns
    fill = textwrap.TextWrapper(width, initial_indent=" ", subsequent_indent=" ").fill
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else fill(part) for part in paragraphs)


@functools.cache
def _improve_help(command: type) -> None:
    """Make the help of flags that nobody has to give `--out PATH`, not `--out {None}|PATH (default: None)`:
    their own text says what holds without them. Texts flow in the terminal's width, where tyro would keep the
    line breaks of the source."""
    texts = field_texts(command)
    plain, full = (typing.get_type_hints(command, include_extras=extras) for extras in (False, True))
    for field in dataclasses.fields(command):
        hint = plain[field.name]
        if dataclasses.is_dataclass(hint):
            _improve_help(typing.cast(type, hint))
            continue
        shown = [tyro.conf.arg(help=texts[field.name])]
        if field.default in (None, ()):
            marks = getattr(full[field.name], "__metadata__", ())
            own = any(getattr(mark, "metavar", None) for mark in marks)
            metavar = _metavar(hint) if field.default is None and not own else None
            shown.append(tyro.conf.arg(help_behavior_hint="", metavar=metavar))
        command.__annotations__[field.name] = typing.Annotated[(full[field.name], *shown)]


def field_texts(command: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(command))).body
    assert isinstance(declared, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(declared.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _metavar(optional: typing.Any) -> str:
    """PATH of Path | None, {a,b} of Literal["a", "b"] | None."""
    kind = next(kind for kind in typing.get_args(optional) if kind is not NoneType)
    names = typing.get_args(kind)
    return f"{{{','.join(names)}}}" if names else kind.__name__.upper()


def _unknown(words: list[str]) -> int:
    group = [name for name in COMMANDS if words and name.split()[0] == words[0]]
    asked = [word for word in words if word not in ("-h", "--help")]
    table = Table.grid(padding=(0, 2))
    for name in group or COMMANDS:
        table.add_row(f"[bold]ant5m {name}[/bold]", COMMANDS[name][1])
    if not asked or (group and asked == [words[0]]):
        Console().print(table, "\n[dim]ant5m COMMAND --help shows the flags and examples of a command.[/dim]")
        return OK
    stderr().print(table)
    return _fail(f"there is no command '{' '.join(asked)}': {_suggestion(asked)}")


def _suggestion(asked: list[str]) -> str:
    """The command that was probably meant."""
    known = {name.split()[-1]: name for name in COMMANDS}  # pack: data pack
    known |= {name.split()[0]: name.split()[0] for name in COMMANDS} | {name: name for name in COMMANDS}
    for words in (asked[:2], asked[:1]):
        if near := difflib.get_close_matches(" ".join(words), known, n=1):
            return f"did you mean 'ant5m {known[near[0]]}'?"
    return "use one of the above"


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    stderr().print(f"[yellow]warning:[/yellow] {_one_line(str(message))}")


def _fail(message: str) -> int:
    stderr().print(f"[bold red]error:[/bold red] {_one_line(message)}")
    return BAD_INPUT


def _one_line(message: str) -> str:
    """With line breaks and control characters, as file names may have, escaped; and so is rich's markup."""
    return escape(on_one_line(message))


__all__ = ["call", "guarded", "main", "main_train"]
