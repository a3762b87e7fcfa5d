"""Chat templates of a hostile checkpoint: none gets out of the sandbox, none goes on for ever, and each fails as a request."""

from __future__ import annotations

import os
import tracemalloc
from typing import Any

import pytest

from zspmd.errors import CheckpointError, RequestError
from zspmd.runtime.engine.chat_template import MAX_CHARACTERS, ChatTemplate

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", "tags": ["a", "b"]}]
VALUES: dict[str, Any] = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True, "bos_token": "<s>"}
ESCAPES = {
    "subclasses of object": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subclasses by item": "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "subclasses by the attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "a name put together": "{{ ''|attr('__cl' ~ 'ass__')|attr('__base__')|attr('__subclasses__')() }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals of tojson": "{{ strftime_now.__globals__.sys.modules }}",
    "code of a function": "{{ strftime_now.__code__ }}",
    "a macro's frame": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "the caller's frame": "{{ self.__init__.__globals__.__builtins__ }}",
    "self's context": "{{ self._TemplateReference__context.environment }}",
    "a cycler's globals": "{{ cycler.__init__.__globals__.os.popen('touch x').read() }}",
    "a joiner's globals": "{{ joiner.__init__.__globals__.os }}",
    "a namespace's globals": "{{ namespace.__init__.__globals__.os }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "the formatter": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "the formatter by name": "{{ '{x.__class__.__init__.__globals__}'.format(x=messages) }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "the formatter, called by map": "{{ ['{0.__class__}']|map('format', messages)|list }}{{ ''.__class__.mro() }}",
    "the map filter's attribute": "{{ messages|map(attribute='__class__')|list|first|attr('mro') }}{{ ().__class__.__bases__ }}",
    "open": "{{ open('/etc/passwd').read() }}",
    "import": "{{ __import__('os').system('true') }}",
    "eval": "{{ eval('1') }}",
    "a template from a file": "{% include '/etc/passwd' %}",
    "inheritance": "{% extends 'base.html' %}",
    "an import of a template": "{% import 'x' as x %}",
    "append": "{{ messages.append(1) }}",
    "clear": "{{ messages[0].clear() }}",
    "pop": "{{ messages.pop() }}",
    "update": "{{ messages[0].update(role='system') }}",
    "a changed list of globals": "{% set x = namespace() %}{% set x.__class__ = 1 %}{{ x.__class__.__mro__ }}",
}
ENDLESS = {
    "loops within loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "a loop with a condition": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursive loop": "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
    "{% for x in ns.l recursive %}{{ loop(x) }}{% endfor %}",
    "a range beyond all use": "{% for a in range(10 ** 9) %}{% endfor %}",
}
LARGE = {
    "a product of text": "{{ 'x' * 10000000000 }}",
    "a product the other way round": "{{ 10000000000 * 'x' }}",
    "a product of a list": "{{ ([0] * 10000000000)|length }}",
    "a power": "{{ messages|length ** 999999999 }}",
    "a power in a constant": "{{ 10 ** 100000000 }}",
    "squares": "{% set ns = namespace(n=10) %}{% for i in range(50) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "text doubled": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "text added to itself": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a list added to itself": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a macro's text doubled": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}"
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = d(ns.s) %}{% endfor %}",
    "a centred text": "{{ 'x'|center(10000000000) }}",
    "a padded text": "{{ 'x'.ljust(10000000000) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a format as wide as asked": "{{ '%*d' % (10000000000, 1) }}",
    "lorem ipsum": "{{ lipsum(n=10000000) }}",
    "much output": "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
}


def outcome(source: str) -> str:
    """Return what a template renders to, or "refused"; any error but zspmd's fails the test."""
    try:
        return ChatTemplate(source).render(**VALUES)
    except (RequestError, CheckpointError):
        return "refused"


@pytest.mark.parametrize("name", ESCAPES)
def test_no_template_gets_out(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = [dict(message) for message in MESSAGES]
    assert outcome(ESCAPES[name]) in ("refused", "")  # what is out of reach is undefined, which prints as nothing
    assert before == MESSAGES
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ENDLESS)
def test_no_template_goes_on_for_ever(name: str) -> None:
    assert outcome(ENDLESS[name]) == "refused"


@pytest.mark.parametrize("name", LARGE)
def test_no_operator_makes_a_gigabyte(name: str) -> None:
    tracemalloc.start()
    try:
        assert outcome(LARGE[name]) == "refused"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 12 * MAX_CHARACTERS


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 // 0 }}",
        "{{ messages[5].content.x }}",
        "{{ messages.x.y }}",
        "{{ 'a' < 1 }}",
        "{{ 1e308 ** 9 }}",
        "{{ '\\ud800' }}{{ raise_exception('no') }}",
    ],
    ids=["division by zero", "out of range", "undefined", "no order", "overflow", "its own words"],
)
def test_whatever_goes_wrong_in_a_template_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses these messages"):
        ChatTemplate(source).render(**VALUES)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ " + "(" * 10_000 + " }}", "{{ x | nofilter }}"], ids=["syntax", "too deep", "unknown filter"]
)
def test_a_malformed_template_is_the_checkpoints_error(source: str) -> None:
    with pytest.raises(CheckpointError):
        ChatTemplate(source)


def test_each_rendering_has_the_whole_bound() -> None:
    template = ChatTemplate("{% for a in range(40000) %}{% for b in '123456' %}{% endfor %}{% endfor %}done")
    assert [template.render(**VALUES) for _ in range(3)] == ["done"] * 3


def test_loops_know_where_they_are() -> None:
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.previtem is defined }}"
        "{{ loop.nextitem is defined }} {% endfor %}{% for x in undefined_name %}{% else %}none{% endfor %}"
        "{% for t in messages[1].tags recursive %}{{ t }}{% endfor %}{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    )
    assert ChatTemplate(source).render(**VALUES) == "1/2TrueFalseFalseTrue 2/2FalseTrueTrueFalse noneabrole=user;content=Hi;"
