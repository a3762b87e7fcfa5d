from __future__ import annotations

import getpass

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.launch.launch_id import check_launch_id, generate_launch_id


def test_generated_ids_are_valid_and_differ() -> None:
    ids = {generate_launch_id() for _ in range(50)}
    assert len(ids) == 50
    assert {check_launch_id(launch_id) for launch_id in ids} == ids


@pytest.mark.parametrize("user", ["DOMAIN\\user name", "é", "-x", "u" * 100, ""], ids=["spaces", "accent", "dash", "long", "empty"])
def test_any_user_name_gives_a_valid_id(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    assert check_launch_id(generate_launch_id())


@pytest.mark.parametrize("text", ["a", "A-1_b.c", "9", "_", "x" * 64])
def test_valid_ids_are_returned(text: str) -> None:
    assert check_launch_id(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", ".a", "-n", "a/b", "a b", "a\n", "é", "x" * 65, 3, None], ids=repr)
def test_ids_that_could_not_name_a_directory_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        check_launch_id(text)  # type: ignore[arg-type]  # the point of some cases
