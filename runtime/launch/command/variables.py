"""The variables that ``-x`` and ``--env-file`` set in every rank, on whichever node."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from ....errors import ConfigError
from ..plan import FACT_NAMES, is_foreign

_MAX_FILE_BYTES = 1 << 20
_MAX_TOLD = 10
_LINE = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(.*)", re.DOTALL)
_COMMENT = re.compile(r"[ \t]#.*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$", "`": "`"}
_RULE = "write NAME=VALUE, with a value in '...' or \"...\" where it has blanks"


def read_variables(entries: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that the entries of --env set: NAME=VALUE, NAME for a copy, or a pattern for copies of all that it fits.

    Raises:
        ConfigError: an entry without a name, a variable that the launch itself sets, or nothing to copy.
    """
    here = os.environ if environment is None else environment
    variables: dict[str, str] = {}
    for entry in entries:
        name, has_value, value = entry.partition("=")
        if not name:
            raise ConfigError(f"--env {entry!r} names no variable; write NAME=VALUE, or NAME to copy its value")
        if is_pattern(entry):
            variables.update(_matching(entry, here))
            continue
        _check_name("--env", name)
        if not has_value and name not in here:
            raise ConfigError(f"--env {name}: it is not set here, so that there is nothing to copy; write {name}=VALUE")
        variables[name] = value if has_value else here[name]
    return variables


def is_pattern(entry: str) -> bool:
    """Say whether an entry of --env stands for all variables whose names it fits."""
    return "=" not in entry and any(character in entry for character in "*?[")


def read_env_files(paths: Sequence[str]) -> dict[str, str]:
    """Return what files with a line NAME=VALUE for each variable set, the later above the earlier.

    Lines may be empty, begin with ``export`` or be a comment (``#``). A value in single quotes is taken as it is, in double quotes a
    backslash escapes (n, r, t, a quote, itself, $), and one without quotes ends before a blank and a ``#``. Nothing is expanded.

    Raises:
        ConfigError: a file cannot be read, or lines of it break the rule: all of them.
    """
    variables: dict[str, str] = {}
    for path in paths:
        variables.update(_read_env_text(_read_file(path), path))
    return variables


def _read_env_text(text: str, path: str) -> dict[str, str]:
    variables: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        try:
            variables.update(_read_line(line.strip()))
        except ConfigError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = [f"and {len(problems) - _MAX_TOLD} more"] if len(problems) > _MAX_TOLD else []
        raise ConfigError("\n".join([*problems[:_MAX_TOLD], *more]))
    return variables


def _read_line(line: str) -> Iterator[tuple[str, str]]:
    if line and not line.startswith("#"):
        found = _LINE.fullmatch(line)
        if found is None:
            raise ConfigError(f"this sets no variable; {_RULE}")
        _check_name("", found[1])
        yield found[1], _read_value(found[2])


def _read_value(text: str) -> str:
    quote = text[:1]
    if quote not in ("'", '"') or not quote:
        return _COMMENT.sub("", f" {text}", count=1).strip()
    value, rest = _unquoted(text[1:], quote)
    if rest.strip() and not rest.strip().startswith("#"):
        raise ConfigError(f"something follows the value's closing {quote}; {_RULE}")
    return value


def _unquoted(text: str, quote: str) -> tuple[str, str]:
    """Return the value up to the closing quote, and what follows that."""
    value, characters = "", iter(enumerate(text))
    for index, character in characters:
        if character == quote:
            return value, text[index + 1 :]
        if character == "\\" and quote == '"':
            _, escaped = next(characters, (0, ""))
            character = _ESCAPES.get(escaped, f"\\{escaped}")
        value += character
    raise ConfigError(f"the value has no closing {quote}; values of several lines are not possible")


def _read_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--env-file {path!r} cannot be read: {error.strerror}; give a file with a line NAME=VALUE a variable") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"--env-file {path!r} is larger than {_MAX_FILE_BYTES} bytes; is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--env-file {path!r} is not UTF-8 at byte {error.start}; save it as UTF-8 text") from error


def _matching(pattern: str, environment: Mapping[str, str]) -> dict[str, str]:
    found = {
        name: value
        for name, value in environment.items()
        if fnmatchcase(name, pattern) and name not in FACT_NAMES and not name.startswith("TORCHELASTIC_") and not is_foreign(name)
    }
    if not found:
        raise ConfigError(f"--env {pattern!r} fits no variable that is set here; leave it out, or set one")
    return found


def _check_name(option: str, name: str) -> None:
    if name in FACT_NAMES or name.startswith("TORCHELASTIC_"):
        raise ConfigError(f"{option} {name}: the launch itself sets this variable in every rank".lstrip())
