"""The built-in corpus: English that every machine has.

It is the documentation inside Python itself and inside the packages that ant5m needs: docstrings, longer
comments, help strings, the reference topics of `pydoc`, package descriptions. Sources are parsed, never
imported. What is not prose (code, doctests, signatures, tables, licences) is left out, and no paragraph comes
twice. The same versions of Python and of the packages give the same corpus.
"""

import ast
import functools
import gc
import hashlib
import inspect
import multiprocessing
import os
import re
import signal
import sysconfig
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

MIN_DOCUMENT = 300
"""characters; a module that says less is left out"""
SKIPPED_FOLDERS = re.compile(
    r"(site|dist)-packages|__pycache__|tests?|testing|idle_test|_?vendor(ed)?|_bundled"
)
MIN_PARAGRAPH = 40
"""characters"""

Package = tuple[str, list[Path]]
"""a name and its files"""


@dataclass(frozen=True)
class Builtin:
    """The corpus of this machine: one document for each module, in a stable order."""

    documents: tuple[str, ...]
    packages: dict[str, int]
    """UTF-8 bytes of text from each package, in reading order"""

    @property
    def size(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(self.packages.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the documents."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


_LOADED: list[Builtin] = []


def load_builtin(progress: "Progress | None" = None) -> Builtin:
    """Collect the corpus, once in a process: it takes about half a minute. `progress` gets a bar."""
    if not _LOADED:
        _LOADED.append(collect(list(_packages()), progress))
    return _LOADED[0]


def collect(packages: list[Package], progress: "Progress | None" = None) -> Builtin:
    """One document for each file that has enough prose."""
    files = sum(len(files) for _, files in packages)
    task = progress.add_task("reading the built-in corpus", total=files) if progress else None
    seen = Seen()
    documents: list[str] = []
    sizes: dict[str, int] = {}
    with _pool() as pool:
        for name, paths in packages:
            for found in pool.map(read_prose, paths, chunksize=16):
                text = "\n\n".join(filter(seen.is_new, found))
                if progress and task is not None:
                    progress.advance(task)
                if len(text) >= MIN_DOCUMENT:
                    documents.append(text)
                    sizes[name] = sizes.get(name, 0) + len(text.encode())
    return Builtin(tuple(documents), sizes)


def _pool() -> ProcessPoolExecutor:
    # Forked workers need no importable main module, so this works in any script and notebook; they touch
    # nothing but `ast` and `re`.
    fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else None)
    return ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    gc.disable()  # syntax trees have no cycles, and looking for some doubles the time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # Workers of a process that was killed would wait for work forever.
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


# Finding the files


def _packages() -> Iterator[Package]:
    """The standard library, then the packages that ant5m depends on, nearest first."""
    yield "python", _python_files(Path(sysconfig.get_paths()["stdlib"]))
    installed = {_normal(dist.name): dist for dist in metadata.distributions() if dist.name}
    for name in _dependencies("ant5m", installed):
        yield name, _package_files(installed[name])


def _dependencies(root: str, installed: dict[str, metadata.Distribution]) -> list[str]:
    """Names of the packages that `root` needs and that are here, breadth first, extras left out."""
    found = [root]
    for name in found:
        for requirement in installed[name].requires or () if name in installed else ():
            needed = _normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
            if needed in installed and needed not in found and "extra ==" not in requirement:
                found.append(needed)
    return found[1:]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python_files(root: Path) -> list[Path]:
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not any(map(SKIPPED_FOLDERS.fullmatch, path.parts))]


def _package_files(package: metadata.Distribution) -> list[Path]:
    names = [name for name in package.files or () if name.suffix == ".py" or name.name == "METADATA"]
    kept = [name for name in names if not any(map(SKIPPED_FOLDERS.fullmatch, name.parts))]
    return [Path(str(package.locate_file(name))) for name in sorted(map(str, kept))]


# Finding the documentation in a file


def read_prose(file: Path) -> list[str]:
    """The paragraphs of prose in a Python file, or in the METADATA of a package."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if file.name == "METADATA":
        docs: Iterator[str] = iter([source.partition("\n\n")[2]])
    else:
        docs = (text for _, text in sorted([*_comments(source), *_strings(source)]))
    return [paragraph for doc in docs for paragraph in paragraphs(doc)]


_COMMENTS = re.compile(r"(?:^[ \t]*#(?!!)[^\n]*\n){2,}", re.MULTILINE)
_HASH = re.compile(r"^\s*#+ ?", re.MULTILINE)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments of two lines or more."""
    line, end = 1, 0
    for match in _COMMENTS.finditer(source):
        line += source.count("\n", end, match.start())
        end = match.start()
        yield line, _HASH.sub("", match[0])


def _strings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of docstrings and of strings handed to calls that stand alone, as in
    `add_docstr(f, "...")` and `add_argument(help="...")`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            stack: list[ast.AST] = [ast.parse(source)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Expr):
            yield from _texts(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):  # pydoc's topics
            for value in node.value.values:
                yield from _texts(value)
        for name in ("body", "orelse", "handlers", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                stack.extend(block)


def _texts(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, inspect.cleandoc(node.value)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):  # "...".format(...)
            yield from _texts(node.func.value)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            yield from _texts(argument)


# Making prose of it

HEADING = re.compile(
    r"(keyword |other )?(param(eter)?s?|arg(ument)?s?)|kwargs|returns?|yields?|raises?|notes?|warn(ing)?s?|"
    r"attributes|methods|usage|(in|out)puts?|shape|description|summary|overview|optional|remarks"
)
DROPPED_SECTION = re.compile(
    r"see also|references?|examples?|licen[cs]e|copyright|authors?|contributors|citation|bibliography|"
    r"installation|(external )?links|changelog|badges|sponsors|backers"
)
KEPT_DIRECTIVE = re.compile(r"note|warning|tip|important|caution|hint|attention|danger|admonition|topic")
COMMON = re.compile(
    r"\b(the|an?|and|or|of|to|in|is|are|be|as|by|for|with|on|at|from|that|this|its?|if|when|which|not|can|will|has|"
    r"have|was|were|you|we|your|they|their|there|than|then|but|so|no|any|all|each|may|must|should|would|could|also|"
    r"only|into|over|such|these|those|do|does|one|two|more|other|same|between|where|while|because|without|within|"
    r"how|what|who)\b",
    re.IGNORECASE,
)
UNWANTED = re.compile(
    r"copyright|licen[cs]ed? |all rights reserved|warrant(y|ies)|redistribut|permission is hereby|"
    r"do not edit|auto(matically |-)?generated|noqa|pylint|todo|fixme|xxx|deprecated since|"
    r"https?:|www\.|%[(s]|\{\w*\}",
    re.IGNORECASE,
)

_FENCE = re.compile(r"^(```|~~~)")
_RULE = re.compile(r"^\s*([=\-~^\"'`#*+_.:])\1{2,}[\s=\-~^+|]*$")
_DIRECTIVE = re.compile(r"^\.\. *([\w-]+) *:: *(.*)$")
_MARGINALIA = (".. ", "|", "+--", "@", "$ ", "% ", "[!", "<!--")
_BULLET = re.compile(r"^([-*+•]|\(?\d{1,2}[.)]|#\.) +")
_FIELD = re.compile(
    r"^:(param|parameter|arg|argument|key|keyword|returns?|raises?|ivar|cvar|var|yields?)\b[^:]*: *"
)
_OTHER_FIELD = re.compile(r"^:\w[\w ,.*]*:( |$)")
_GOOGLE = re.compile(r"^\*{0,2}`{0,2}[A-Za-z_][\w.*/]*`{0,2}( ?\([^)]*\) ?: +|\s?: +(?=[A-Z`\"(]))")
_NUMPY = re.compile(r"^[\w*`., /]+ : .*$|^\*{0,2}\w+$")
_INLINE = (
    (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r":[\w:+-]+:`[^`<]*<([^`>]+)>`"), r"\1"),  # :func:`text <name>`
    (re.compile(r":[\w:+-]+:`~?(?:[\w.]*\.)?([^`]*)`"), r"\1"),  # :class:`~a.b.Name`
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`_{0,2}"), r"\1"),  # `text <link>`_
    (re.compile(r"`{1,2}~?([^`]+)`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s?\[[#\w]{1,12}\]_"), ""),  # footnotes
    (re.compile(r"\|(\w+)\|"), r"\1"),
    (re.compile(r"\[([A-Za-z_.]+)\](?!\()"), r"\1"),
    (re.compile(r"\\([*_`|\\])"), r"\1"),
    (
        re.compile(
            r"</?(?:a|b|i|p|br|em|strong|code|pre|tt|sub|sup|div|span|img|h\d|li|ul|td|tr)\b[^>]*>", re.I
        ),
        "",
    ),
)
_MARKUP = re.compile(r"[`*\[|\\<]")
_WORD = re.compile(r"^[(\"']?[A-Za-z]+(?:['’-][A-Za-z]+)*[)\"']?[,.;:!?]*\)?$")
_END = re.compile(r"[.!?][)\"'”]?$")
_SYMBOL = re.compile(r"[_{}\[\]\\^$<>|=/%#@~*+]")


def paragraphs(doc: str) -> Iterator[str]:
    """The paragraphs of prose, one line each, in reStructuredText, numpy, Google or Markdown style."""
    lines = list(_without_code(doc.expandtabs().splitlines()))
    for group in _groups(list(_without_sections(lines))):
        if sum(map(len, group)) >= MIN_PARAGRAPH and is_prose(text := _plain(" ".join(group))):
            yield text


def _without_code(lines: list[str]) -> Iterator[str]:
    """Without fenced and literal blocks, doctests, and directives that hold no prose."""
    fenced = doctest = False
    hidden = 1 << 30  # deeper lines belong to something that is left out
    for line in lines:
        text, indent = line.strip(), _indent(line)
        if _FENCE.match(text):
            fenced = not fenced
        elif not text:
            doctest = False
            yield ""
        elif fenced or doctest or indent > hidden:
            continue
        elif text.startswith(">>>"):
            doctest = True
        elif directive := _DIRECTIVE.match(text):
            kept = KEPT_DIRECTIVE.fullmatch(directive[1].lower())
            hidden = 1 << 30 if kept else indent
            yield " " * indent + directive[2] if kept else ""
        elif not text.startswith(_MARGINALIA):
            hidden = indent if text.endswith("::") else 1 << 30
            yield line


def _without_sections(lines: list[str]) -> Iterator[str]:
    """Without headings, and without the sections that are lists of names, links or code."""
    dropped, beyond = False, -1
    for line, following in _with_next(lines):
        text, indent = line.strip(), _indent(line)
        name = text.strip("#:*= ").lower()
        open_ended = text.startswith("#") or _RULE.match(following) is not None
        if _RULE.match(line):
            continue
        drop = DROPPED_SECTION.fullmatch(name) is not None
        if text and (open_ended or (text.endswith(":") and (drop or HEADING.fullmatch(name)))):
            dropped, beyond = drop, -1 if open_ended else indent
            yield ""
        elif dropped and (not text or indent > beyond):
            continue
        else:
            dropped = False
            yield line


def _groups(lines: list[str]) -> Iterator[list[str]]:
    """Lines that make a paragraph: a text, a list item, or a parameter's description without its name."""
    group: list[str] = []
    before = 0
    for line, following in _with_next(lines):
        text, indent = line.strip(), _indent(line)
        if group and (not text or indent < before or _unlabelled(text) != text or group[-1].endswith(":")):
            yield group
            group = []
        before = indent
        if not text or (not group and _NUMPY.match(text) and _indent(following) > indent):
            continue
        description = _unlabelled(text)
        if description != text:
            description = description[:1].upper() + description[1:]
        if description:
            group.append(description)
    if group:
        yield group


def _with_next(lines: list[str]) -> Iterator[tuple[str, str]]:
    return zip(lines, [*lines[1:], ""], strict=False)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _unlabelled(line: str) -> str:
    """A list item or a parameter's description without its marker, name and type."""
    if line[0] == ":":
        line = _FIELD.sub("", line)
        return "" if _OTHER_FIELD.match(line) else line
    return _GOOGLE.sub("", _BULLET.sub("", line))


def _plain(text: str) -> str:
    """Without inline markup, and with the full stop that a summary line often lacks."""
    if _MARKUP.search(text):
        for pattern, replacement in _INLINE:
            text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    unfinished = COMMON.fullmatch(text.rpartition(" ")[2])
    return text + "." if text[-1:].isalnum() and not unfinished else text


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as English: whole sentences of mostly plain words."""
    if len(text) < MIN_PARAGRAPH or not (text[0].isupper() or text[0] in "\"'(") or not _END.search(text):
        return False
    words = text.split()
    if len(words) < 7 or UNWANTED.search(text) or len(_SYMBOL.findall(text)) > 0.03 * len(text):
        return False
    plain = sum(_WORD.match(word) is not None for word in words)
    return plain >= 0.8 * len(words) and len(COMMON.findall(text)) >= 0.18 * len(words)


class Seen:
    """Remembers paragraphs by hashes of five words in a row, of which one in four is kept."""

    LENGTH = 5
    ONE_IN = 4

    def __init__(self) -> None:
        self._paragraphs: set[int] = set()
        self._phrases: set[int] = set()

    def is_new(self, text: str) -> bool:
        """False when the same words, or more than half of the paragraph's phrases, were there before."""
        words = re.findall(r"[a-z]+", text.lower())
        key = _hash(words)
        if key in self._paragraphs:
            return False
        self._paragraphs.add(key)
        spans = range(len(words) - self.LENGTH + 1)
        phrases = {phrase for i in spans if (phrase := _hash(words[i : i + self.LENGTH])) % self.ONE_IN == 0}
        known = len(phrases & self._phrases)
        self._phrases |= phrases
        return 2 * known <= len(phrases)


def _hash(words: list[str]) -> int:
    # The same in every process, unlike `hash`.
    return zlib.crc32(" ".join(words).encode())
