"""Chat templates, which come with the checkpoint: Jinja's sandbox over plain JSON data, and a bound on how long one may go on.

What templates may use is what Transformers offers them (``utils/chat_template_utils.py``): ``raise_exception``, ``strftime_now``,
``tojson``, loop controls and the ``generation`` block.

The sandbox lets nothing out, but a template could loop for ever, and the driver's loop waits for it. So rounds, calls and characters
are counted, and the operators and arguments by which one expression makes a gigabyte are checked. That ends templates that run away. It
is no wall against one that is made to use up memory or time: a single ``replace`` or ``join``, or the text of lists that hold each other
many times over, is one operation here. Whom that matters to renders chats elsewhere and gives text as the prompt.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from ...errors import CheckpointError, RequestError

MAX_ROUNDS = 500_000  # of all loops of one rendering: some tenths of a second
_ROUNDS_PER_CALL = 10  # as long as it takes
MAX_CHARACTERS = 16 << 20
_MAX_BITS = 4096
_WIDE = re.compile(r"\*|[0-9]{5}")  # a width of a format


class ChatTemplate:
    """A compiled chat template.

    Raises:
        CheckpointError: ``source`` is malformed.
    """

    def __init__(self, source: str) -> None:
        self._environment = _BoundedEnvironment()
        try:
            tree = self._environment.parse(source)
            for loop in list(tree.find_all(jinja2.nodes.For)):
                loop.iter = jinja2.nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
            for concat in list(tree.find_all(jinja2.nodes.Concat)):
                concat.nodes = [jinja2.nodes.Filter(part, _MEASURED, [], [], None, None, lineno=part.lineno) for part in concat.nodes]
            code = self._environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template is malformed at its line {error.lineno}: {error.message}") from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}") from error
        self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))

    def render(self, **values: Any) -> str:
        """Return the text; raises RequestError when the template refuses the values, fails over them, or goes on too long."""
        self._environment.start()
        try:
            return self._template.render(**values)
        except Exception as error:  # a template can fail in every way that an expression can
            raise RequestError(f"the chat template refuses these messages: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's turns for training; here its body counts as if it stood alone."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Counts loop rounds, calls and characters from ``start`` on."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.start()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols], finalize=self._count_characters
        )
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _bounded(_tojson)
        self.filters[_COUNTED] = self._count_rounds
        self.filters[_MEASURED] = self._count_characters
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # random text of any length, which no chat needs

    def start(self) -> None:
        self._rounds_left = MAX_ROUNDS
        self._characters_left = MAX_CHARACTERS

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._spend_rounds(_ROUNDS_PER_CALL)
        _check_numbers(args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _count_rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend_rounds(1)
            yield item

    def _count_characters(self, value: Any) -> Any:
        self._characters_left -= len(value) if isinstance(value, str) else 1
        if self._characters_left < 0:
            raise jinja2.TemplateError(f"it writes more than {MAX_CHARACTERS} characters")
        return value

    def _spend_rounds(self, count: int) -> None:
        self._rounds_left -= count
        if self._rounds_left < 0:
            raise jinja2.TemplateError(f"it takes more than {MAX_ROUNDS} loop rounds, of which a call counts for {_ROUNDS_PER_CALL}")


_COUNTED, _MEASURED = "zspmd_counted", "zspmd_measured"


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse what would make a number or text beyond all use before it is made."""
    sizes = [len(side) if isinstance(side, str) else 8 * len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
    numbers = [side for side in (left, right) if isinstance(side, int)]
    is_wide = operator == "%" and isinstance(left, str) and _WIDE.search(left) is not None
    if operator == "*" and sizes and numbers:
        is_wide = sizes[0] * numbers[0] > MAX_CHARACTERS
    elif operator == "*" and len(numbers) == 2:
        is_wide = sum(number.bit_length() for number in numbers) > _MAX_BITS
    elif operator == "**" and len(numbers) == 2:
        is_wide = left.bit_length() * abs(right) > _MAX_BITS
    elif operator == "+":
        is_wide = sum(sizes) > MAX_CHARACTERS
    if is_wide:
        raise jinja2.TemplateError(f"the result of its {operator!r} would be too large")


def _check_numbers(args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    """Refuse widths and counts beyond all use."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"it asks for {value:.3g} of something")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that takes no number beyond all use as its argument; the first is what it filters."""

    @functools.wraps(function)
    def checked(first: Any, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        return function(first, *args, **kwargs)

    return checked


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
