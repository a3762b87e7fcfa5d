"""Tokenizer: files, special tokens, chat templates as Transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from zspmd.errors import CheckpointError, RequestError
from zspmd.runtime.engine.tokenizer import Tokenizer

CHAT = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "Hi & ö"}, {"role": "assistant", "content": "Yes?"}]
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "blocks": "{%- for m in messages %}\n    {% if m.role == 'user' %}\nQ: {{ m.content }}\n    {% else %}\nA: {{ m.content }}\n"
    "    {% endif %}\n{%- endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "optional": "{% if tools is none and documents is none %}no tools{% endif %}{{ strftime_now('%Y') | length }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.fixture
def directory(tmp_path: Path, byte_level_backend: tokenizers.Tokenizer) -> Path:
    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, bos_token="<s>", eos_token={"content": "</s>", "__type": "AddedToken"})
    return tmp_path


def write_config(directory: Path, **config: object) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))


def test_encode_adds_the_special_tokens_of_the_file_and_decode_hides_them(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    tokens = tokenizer.encode("quick 你好")
    assert tokens[0] == 0
    assert tokenizer.decode(tokens) == "quick 你好"
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.vocab_size == 330


def test_truncation_and_padding_of_the_file_are_left_out(directory: Path, byte_level_backend: tokenizers.Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("a long enough text")) == "a long enough text"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_and_encoded_as_transformers_does(directory: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    write_config(directory, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[name])
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.render_chat(CHAT) == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    wanted = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(tokenizer.render_chat(CHAT), add_special_tokens=False) == wanted


def test_the_template_file_goes_before_the_config(directory: Path) -> None:
    write_config(directory, chat_template="config")
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(directory).render_chat(CHAT) == "file"


def test_the_default_of_several_templates_is_taken(directory: Path) -> None:
    write_config(directory, chat_template=[{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}])
    assert Tokenizer.from_directory(directory).render_chat(CHAT) == "default"


def test_special_tokens_may_stand_in_a_file_of_their_own(directory: Path) -> None:
    write_config(directory, chat_template="{{ bos_token }}|{{ eos_token }}", eos_token="</e>")
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<b>"}, "eos_token": "old"}))
    assert Tokenizer.from_directory(directory).render_chat(CHAT) == "<b>|</e>"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "roles must alternate"),
        ("{{ messages[0].content }}", [], "at least one mapping"),
        ("{{ messages[0].content }}", ["Hi"], "at least one mapping"),
        ("{{ messages[0].content }}", [{"role": "user", "content": b"Hi"}], "JSON data only"),
        ("{{ messages.__class__.__mro__ }}", CHAT, "unsafe"),
        ("{{ messages[0].content + 1 }}", CHAT, "refuses these messages"),
    ],
    ids=["no template", "refused", "empty", "no mappings", "bytes", "sandbox", "type"],
)
def test_a_chat_that_cannot_be_rendered_is_the_requests_error(
    directory: Path, template: str | None, messages: list[dict[str, object]], message: str
) -> None:
    write_config(directory, **({} if template is None else {"chat_template": template}))
    with pytest.raises(RequestError, match=message):
        Tokenizer.from_directory(directory).render_chat(messages)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json; add one, or give prompts as token ids"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "is a JSON list"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template in .* is a int"),
    ],
    ids=["missing", "malformed", "no JSON", "no object", "template type"],
)
def test_a_bad_file_is_named(directory: Path, file: str, content: str | None, message: str) -> None:
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(directory)


def test_a_malformed_template_is_the_checkpoints_error_and_leaves_text_prompts_alone(directory: Path) -> None:
    write_config(directory, chat_template="{% for %}")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("text")
    with pytest.raises(CheckpointError, match="malformed at its line 1"):
        tokenizer.render_chat(CHAT)
