"""`ant5m completion`."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

_SCRIPT = """\
_ant5m() {{
    local words="${{COMP_WORDS[*]:1:$((COMP_CWORD-1))}} " current="${{COMP_WORDS[COMP_CWORD]}}" choices=""
    case "$words" in
{cases}
        " ") choices="{first}" ;;
    esac
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
}}
complete -o default -F _ant5m ant5m
"""
_POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
autoload -Uz bashcompinit && bashcompinit
"""
"""zsh's own completion, where ~/.zshrc has not begun it yet, and bash's within it"""


@dataclass
class Completion:
    """Print a script with which the shell completes commands and flags.

    Examples:

        eval "$(ant5m completion bash)"       # in ~/.bashrc
        eval "$(ant5m completion zsh)"        # in ~/.zshrc
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """bash or zsh"""

    def run(self) -> None:
        print((_ZSH if self.shell == "zsh" else "") + script(), end="")


def script() -> str:
    """For bash: the first words of the commands, their second ones, and each command's flags."""
    from ant5m.cli import COMMANDS, load_command

    cases = [(f"{name} *", " ".join(flags(load_command(name)))) for name in COMMANDS]
    groups: dict[str, list[str]] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        groups.setdefault(first, []).append(second)
    cases += [(f"{first} ", " ".join(seconds)) for first, seconds in groups.items() if all(seconds)]
    lines = "\n".join(f'        "{_pattern(case)}) choices="{choices}" ;;' for case, choices in cases)
    return _SCRIPT.format(cases=lines, first=" ".join([*groups, "help", "--version"]))


def flags(command: type) -> list[str]:
    """The flags of a command, with those of a config in it."""
    found = ["--help"]
    for field in dataclasses.fields(command):
        hint: Any = typing.get_type_hints(command)[field.name]
        if dataclasses.is_dataclass(hint):
            found += flags(typing.cast(type, hint))[1:]
        elif not _is_positional(command, field.name):
            found.append("--" + field.name.replace("_", "-"))
    return found


def _is_positional(command: type, name: str) -> bool:
    hint = typing.get_type_hints(command, include_extras=True)[name]
    # What tyro.conf.Positional[...] and Annotated[..., tyro.conf.Positional] have in common.
    return any(mark is _POSITIONAL for mark in getattr(hint, "__metadata__", ()))


def _pattern(case: str) -> str:
    """A shell pattern whose quoted part is `case` without a star at its end."""
    return case[:-1] + '"*' if case.endswith("*") else case + '"'
