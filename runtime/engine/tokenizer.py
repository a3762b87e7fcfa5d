"""Text to tokens and back with the checkpoint's own ``tokenizer.json`` and chat template; imports no Transformers.

Every file has a size limit and is parsed as data; ``chat_template`` runs the template, bounded and in a sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ...errors import CheckpointError, RequestError
from ...safetensors_files import read_json_object, read_small_file
from .byte_pieces import BytePieces
from .chat_template import ChatTemplate

MAX_TOKENIZER_BYTES = 256 << 20  # the largest have a tenth of it
MAX_TEMPLATE_BYTES = 1 << 20


class Tokenizer:
    """Encodes prompts and chats, decodes outputs.

    Args:
        backend: the parsed ``tokenizer.json``.
        chat_template: Jinja source; None where the checkpoint has none.
        special_tokens: by the names that templates use, such as ``bos_token``.

    Attributes:
        special_token_ids: what ``decode`` leaves out.
        byte_pieces: what each token stands for, where it does not depend on its neighbours; None where it does.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._compiled: ChatTemplate | None = None
        self.special_token_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        is_byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self.byte_pieces = BytePieces(backend, self.special_token_ids) if is_byte_level else None

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
        text = read_small_file(file, max_bytes=MAX_TOKENIZER_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_buffer(text)
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(directory / "special_tokens_map.json")) | _special_tokens(config)
        return cls(backend, _find_chat_template(directory, config), special_tokens)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included; the model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens that ``tokenizer.json`` puts around it; a rendered chat has its own."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is no text that UTF-8 can hold: {error}") from error
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise RequestError(f"tokenizer.json cannot encode this prompt: {error}") from error

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
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"chat messages may hold JSON data only: {error}") from error
        return self._template().render(messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD."""
        try:
            return str(self._backend.decode(token_ids, skip_special_tokens=True))
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            raise CheckpointError(f"tokenizer.json cannot decode {len(token_ids)} tokens: {error}") from error

    def _template(self) -> ChatTemplate:
        if self._compiled is None:
            if self._chat_template is None:
                raise RequestError("this checkpoint has no chat template; give the prompt as text, or add chat_template.jinja to it")
            self._compiled = ChatTemplate(self._chat_template)
        return self._compiled


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether the package raised this: it has no types of its own, and a panic of its Rust code is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}


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
    if file.exists():
        try:
            return read_small_file(file, max_bytes=MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is no UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _default_of(template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"chat_template in {directory}/tokenizer_config.json is a {type(template).__name__}; a text was expected")
    return template


def _default_of(templates: Iterable[Any]) -> Any:
    entries = [entry for entry in templates if isinstance(entry, dict) and entry.get("name") == "default"]
    return entries[-1].get("template") if entries else None
