"""Conversations: messages, as a chat template writes them, and which parts of that the model is to learn.

A conversation is a list of messages {"role": "user", "content": "..."}, as in the data sets of the hub.
The template is Jinja, as transformers takes it from `tokenizer_config.json`; it runs in Jinja's sandbox.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from jinja2.ext import Extension

from ant5m.data.corpus import Corpus, OnError
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError, first_line

MESSAGES = "messages"
"""the usual name of their column"""
ROLES = ("system", "user", "assistant")

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n\n' }}"
    "{{ (message['role'] | capitalize) + ':\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ('\n\n' if messages else '') + 'Assistant:\n' }}{% endif %}"
)
"""for tokenizers without a template of their own: it needs no other token than the end of a text"""

Message = dict[str, str]


class Conversation(str):
    """The text of a conversation, which knows its parts: (text, whether it is learned)."""

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> "Conversation":
        self = super().__new__(cls, "".join(text for text, _ in parts))
        self.parts = tuple(parts)
        return self


class ChatTemplate:
    """The chat template of a tokenizer, ready to write conversations and to encode them."""

    def __init__(self, tokenizer: Tokenizer, default: str | None = None) -> None:
        """`default`: for a tokenizer without a template. Raises `UserError` where there is none, or it is
        broken."""
        template = _default_of(tokenizer.settings.get("chat_template")) or default
        if template is None:
            raise UserError(
                "the tokenizer has no chat template: the model was not trained on conversations "
                "(see ant5m data pack --chat)"
            )
        self.text = template
        self._settings = {key: value for key, value in tokenizer.settings.items() if key.endswith("_token")}
        self._settings |= {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token}
        self._template = _compile(template)
        added = tokenizer.backend.get_added_tokens_decoder()
        self._control = {token.content for token in added.values() if token.special} | {tokenizer.eos_token}
        # Unlike the tokenizer itself, it takes `<|im_end|>` for the token: the template's, as no message may
        # spell one.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False
        self._eos_token_id = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self.end_ids = self._end_ids(tokenizer)
        """what ends a reply: the end of a text, and the control tokens that the template writes behind it"""

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which does not know a compiled template."""
        return ChatTemplate, (self._tokenizer, self.text)

    def render(self, messages: Sequence[Message], reply: bool = False) -> str:
        """The text of a conversation; with `reply` up to where the assistant begins to write.

        Raises `UserError` where the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=reply, tools=None, documents=None, **self._settings
            )
        except _FAILURES as error:
            raise UserError(
                f"the chat template cannot write this conversation ({first_line(error)})"
            ) from None

    def split(self, messages: Any) -> Conversation:
        """A conversation with its parts: what the assistant writes, to the end of its message, is learned.

        Raises `UserError` when there is nothing to learn, when a message is not one, or spells a control
        token, or when the template does not write a conversation from left to right.
        """
        checked = self._check(messages)
        text = self.render(checked)
        parts: list[tuple[str, bool]] = []
        position = 0
        for number, message in enumerate(checked):
            if message["role"] != "assistant":
                continue
            before, after = self.render(checked[:number], reply=True), self.render(checked[: number + 1])
            if not (after.startswith(before) and text.startswith(after) and len(before) >= position):
                raise UserError("the chat template changes earlier messages: it cannot be learned from")
            parts += [(text[position : len(before)], False), (text[len(before) : len(after)], True)]
            position = len(after)
        parts.append((text[position:], False))
        return Conversation([part for part in parts if part[0]])

    def encode(self, conversations: Sequence[Conversation]) -> tuple[list[int], list[bool], list[int]]:
        """Ids of all conversations end to end, whether each is learned, and how many each has. Every
        conversation ends with one end-of-text id."""
        texts = [text for conversation in conversations for text, _ in conversation.parts]
        encoded = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        ids: list[int] = []
        learned: list[bool] = []
        lengths = []
        for conversation in conversations:
            begin = len(ids)
            for _, counts in conversation.parts:
                part = next(encoded).ids
                ids += part
                learned += [counts] * len(part)
            if len(ids) == begin or ids[-1] != self._eos_token_id:
                ids.append(self._eos_token_id)
                learned.append(False)
            lengths.append(len(ids) - begin)
        return ids, learned, lengths

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant begins to write."""
        text = self.render(self._check(messages, learn=False), reply=True)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def clean(self, reply: str) -> str:
        """What a model wrote, as the content of a message: no control token may stand in one."""
        for token in self._control:
            reply = reply.replace(token, "")
        return reply

    def _check(self, messages: Any, learn: bool = True) -> list[Message]:
        if isinstance(messages, str):  # some data sets keep them so
            try:
                messages = json.loads(messages)
            except (json.JSONDecodeError, RecursionError):
                raise UserError("the messages are text, not a list of messages") from None
        if not isinstance(messages, list) or not messages:
            raise UserError("the messages are not a list of messages, or empty")
        for number, message in enumerate(messages, 1):
            self._check_message(message, f"message {number}")
        if learn and all(message["role"] != "assistant" for message in messages):
            raise UserError("no message is the assistant's: there is nothing to learn")
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def _check_message(self, message: Any, where: str) -> None:
        if not isinstance(message, dict):
            raise UserError(f"{where} is not an object with role and content")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise UserError(f"{where} has no {name} that is text")
        if message["role"] not in ROLES:
            raise UserError(f"{where} has the role '{message['role']}': {', '.join(ROLES)} are known")
        content = message["content"]
        spelled = [token for token in self._control if token in content]
        if spelled:
            raise UserError(f"{where} spells the control token {spelled[0]}")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where} is not UTF-8 text") from None

    def _end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, learned, _ = self.encode([self.split(exchange)])
        control = {tokenizer.vocab[token] for token in self._control if token in tokenizer.vocab}
        ends = [i for i, counts in zip(ids, learned, strict=True) if counts and i in control]
        return tuple(dict.fromkeys([*tokenizer.end_ids, *ends]))


_FAILURES = (
    *(jinja2.TemplateError, RecursionError, MemoryError),
    *(TypeError, ValueError, ArithmeticError, LookupError),
)
"""of a template"""


@dataclass(frozen=True)
class Conversations(Corpus):
    """Sources whose rows hold conversations. Make one with `Conversations.find`."""

    template: ChatTemplate | None = None  # a default only because the fields before it have one

    @classmethod
    def find(
        cls,
        names: Sequence[str | Path],
        template: ChatTemplate,
        column: str = MESSAGES,
        on_error: OnError = "stop",
    ) -> "Conversations":
        """As `Corpus.open`, of .jsonl, .parquet and hf: only."""
        found = Corpus.open(names, column, on_error)
        for source in found.sources:
            if source.name == "builtin" or ".txt" in Path(source.name).suffixes:
                raise UserError(f"{source.name} holds no conversations: give .jsonl, .parquet or hf:")
        return cls(found.sources, column, on_error, template.split, template=template)


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a text of a model with this tokenizer: a reply's end too, where there is a chat template
    that works."""
    try:
        return ChatTemplate(tokenizer).end_ids
    except UserError:
        return tokenizer.end_ids


def _default_of(templates: Any) -> str | None:
    """The template, or of several with names the one called default."""
    if isinstance(templates, list):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def _compile(template: str) -> Any:
    # As transformers sets Jinja up: templates rely on it.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(f"the chat template is broken ({first_line(error)})") from None


class _Generation(Extension):
    """`{% generation %}` marks for transformers what the assistant writes; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
