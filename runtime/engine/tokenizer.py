"""Text to tokens and back with the checkpoint's own ``tokenizer.json`` and chat template; imports no Transformers.

Chat templates come with the checkpoint, so they run in Jinja's sandbox and see plain JSON data only. What they may use is what
Transformers offers them (``utils/chat_template_utils.py``): ``raise_exception``, ``strftime_now``, ``tojson``, loop controls and
the ``generation`` block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from ...errors import CheckpointError, RequestError


class Tokenizer:
    """Encodes prompts and chats, decodes outputs.

    Args:
        backend: the parsed ``tokenizer.json``.
        chat_template: Jinja source; None where the checkpoint has none.
        special_tokens: by the names that templates use, such as ``bos_token``.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._compiled: jinja2.Template | None = None
        self.special_token_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` of a model directory.

        Raises:
            CheckpointError: no ``tokenizer.json``, or a file that cannot be read.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json; add one, or give prompts as token ids")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing more specific
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(directory / "special_tokens_map.json")) | _special_tokens(config)
        return cls(backend, _find_chat_template(directory, config), special_tokens)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included; the model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens that ``tokenizer.json`` puts around it; a rendered chat has its own."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is no text that UTF-8 can hold: {error}") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation as the model was trained to see it, ending where the assistant's answer begins.

        Args:
            messages: each with ``role`` and ``content``, and whatever else the template knows; JSON data only.

        Raises:
            RequestError: no messages, no chat template, data that is no JSON, or a conversation that the template refuses.
            CheckpointError: the template itself is malformed.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise RequestError("chat messages must be a list of at least one mapping with role and content")
        try:
            plain = json.loads(json.dumps([dict(message) for message in messages]))
        except (TypeError, ValueError) as error:
            raise RequestError(f"chat messages may hold JSON data only: {error}") from error
        template = self._template()
        try:
            return template.render(messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def _template(self) -> jinja2.Template:
        if self._compiled is None:
            if self._chat_template is None:
                raise RequestError("this checkpoint has no chat template; give the prompt as text, or add chat_template.jinja to it")
            try:
                self._compiled = _template_environment().from_string(self._chat_template)
            except jinja2.TemplateSyntaxError as error:
                raise CheckpointError(f"the chat template is malformed at its line {error.lineno}: {error.message}") from error
        return self._compiled


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's turns for training; here its body counts as if it stood alone."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Transformers has it: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; a JSON object was expected")
    return data


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Entries such as ``bos_token``, which are a text or an object with ``content``."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _find_chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _default_of(template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"chat_template in {directory}/tokenizer_config.json is a {type(template).__name__}; a text was expected")
    return template


def _default_of(templates: Iterable[Any]) -> Any:
    named = {entry["name"]: entry["template"] for entry in templates if isinstance(entry, dict) and {"name", "template"} <= entry.keys()}
    return named.get("default")
