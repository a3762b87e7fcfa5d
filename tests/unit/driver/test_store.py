"""The coordinator's store as a state machine: operations, who is set free when, and timeouts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from zspmd.errors import BadFrameError
from zspmd.runtime.driver.store import Replies, StoreState
from zspmd.transport.records import MAX_RECORD_BYTES, MAX_SEQ, MAX_STORE_VALUE_BYTES, StoreReply, StoreRequest
from zspmd.transport.schema import pack_record

A, B = b"a", b"b"


class Store:
    """A state with a clock that the test sets, and one counter for request ids."""

    def __init__(self) -> None:
        self.state = StoreState()
        self.now = 100.0
        self.request_id = 0

    def ask(self, op: str, *keys: str, connection: bytes = A, timeout_s: float = 10.0, value: bytes = b"", **fields: object) -> Replies:
        self.request_id += 1
        request = StoreRequest(
            request_id=self.request_id,
            op=op,
            keys=keys,
            value=value,
            timeout_s=timeout_s,
            **fields,  # type: ignore[arg-type]  # the fields of StoreRequest
        )
        return self.state.handle(connection, request, self.now)

    def reply(self, op: str, *keys: str, value: bytes = b"", **fields: object) -> StoreReply:
        ((connection, reply),) = self.ask(op, *keys, value=value, **fields)  # type: ignore[arg-type]  # as above
        assert (connection, reply.request_id, reply.error) == (A, self.request_id, "")
        return reply

    def expire(self) -> Replies:
        return self.state.expire(self.now)


@pytest.fixture
def store() -> Store:
    return Store()


def test_what_was_set_is_got(store: Store) -> None:
    store.reply("set", "k", value=b"v")
    assert store.reply("get", "k").value == b"v"
    store.reply("set", "k", value=b"w")
    assert store.reply("get", "k").value == b"w"


def test_add_counts_in_decimal_text(store: Store) -> None:
    assert [store.reply("add", "n", amount=amount).amount for amount in (5, -7, 0)] == [5, -2, -2]
    assert store.reply("get", "n").value == b"-2"


@pytest.mark.parametrize(
    ("before", "expected", "after", "answer"),
    [
        (None, b"", b"new", b"new"),
        (None, b"x", None, b"x"),
        (b"old", b"old", b"new", b"new"),
        (b"old", b"x", b"old", b"old"),
        (b"old", b"", b"old", b"old"),
    ],
    ids=["absent, none expected", "absent, one expected", "as expected", "another", "none expected"],
)
def test_compare_set(store: Store, before: bytes | None, expected: bytes, after: bytes | None, answer: bytes) -> None:
    if before is not None:
        store.reply("set", "k", value=before)
    assert store.reply("compare_set", "k", value=b"new", expected=expected).value == answer
    assert store.state.values.get("k") == after


def test_delete_check_and_count(store: Store) -> None:
    assert store.reply("count").amount == 0
    store.reply("set", "a", value=b"1")
    store.reply("set", "b", value=b"")
    assert store.reply("count").amount == 2
    assert store.reply("check", "a", "b").amount == 1
    assert store.reply("delete", "a").amount == 1
    assert store.reply("delete", "a").amount == 0
    assert store.reply("check", "a", "b").amount == 0
    assert store.reply("check").amount == 1


@pytest.mark.parametrize(("op", "fields"), [("set", {}), ("add", {"amount": 0}), ("compare_set", {})], ids=["set", "add", "compare_set"])
def test_whatever_makes_a_key_frees_those_who_wait(store: Store, op: str, fields: dict[str, object]) -> None:
    assert store.ask("get", "k", connection=B) == []
    replies = store.ask(op, "k", value=b"", **fields)  # type: ignore[arg-type]  # as above
    assert [connection for connection, _ in replies] == [A, B]
    assert store.state.next_deadline() is None


def test_waiters_are_freed_in_the_order_in_which_they_came(store: Store) -> None:
    for connection in (B, A, b"c"):
        assert store.ask("get", "k", connection=connection) == []
    assert store.ask("get", "other", connection=b"d") == []
    replies = store.ask("set", "k", value=b"v", connection=b"e")
    assert [(connection, reply.value) for connection, reply in replies] == [(b"e", b""), (B, b"v"), (A, b"v"), (b"c", b"v")]
    assert [reply.request_id for _, reply in replies] == [5, 1, 2, 3]


def test_equal_requests_are_told_apart(store: Store) -> None:
    """Two threads of a rank may wait for the same key with the same request id on connections of their own."""
    request = StoreRequest(request_id=1, op="wait", keys=("x",), timeout_s=1.0)
    for connection in (A, B):
        store.state.handle(connection, request, store.now)
    store.state.handle(A, StoreRequest(request_id=2, op="wait", keys=("y",), timeout_s=1.0), store.now)
    replies = store.ask("set", "x")
    assert [connection for connection, _ in replies[1:]] == [A, B]
    assert [reply.request_id for _, reply in store.ask("set", "y")[1:]] == [2]


def test_a_wait_needs_every_key(store: Store) -> None:
    assert store.ask("wait", "a", "b", "c", connection=B) == []
    assert len(store.ask("set", "a")) == 1
    assert len(store.ask("set", "c")) == 1
    assert store.ask("set", "b")[1] == (B, StoreReply(request_id=1))


def test_a_wait_for_what_is_there_answers_at_once(store: Store) -> None:
    store.reply("set", "a", value=b"v")
    assert store.reply("wait", "a") == StoreReply(request_id=2)
    assert store.reply("wait") == StoreReply(request_id=3)


def test_a_timeout_names_the_absent_keys(store: Store) -> None:
    store.reply("set", "a", value=b"v")
    store.ask("wait", "a", "b", "c", timeout_s=5.0, connection=B)
    store.ask("get", "d", timeout_s=2.0)
    assert store.state.next_deadline() == 102.0
    store.now = 101.9
    assert store.expire() == []
    store.now = 102.0
    assert store.expire() == [(A, StoreReply(request_id=3, absent=("d",)))]
    assert store.state.next_deadline() == 105.0
    store.now = 200.0
    assert store.expire() == [
        (
            B,
            StoreReply(
                request_id=2,
                absent=(
                    "b",
                    "c",
                ),
            ),
        )
    ]
    assert (store.state.next_deadline(), store.expire()) == (None, [])


def test_an_expired_waiter_is_not_answered_twice(store: Store) -> None:
    store.ask("get", "k", timeout_s=1.0, connection=B)
    store.now += 1.0
    assert len(store.expire()) == 1
    assert len(store.ask("set", "k")) == 1


def test_a_deleted_key_has_to_be_waited_for_again(store: Store) -> None:
    store.reply("set", "k", value=b"v")
    store.reply("delete", "k")
    assert store.ask("get", "k") == []


@pytest.mark.parametrize(
    ("op", "keys", "fields", "words"),
    [
        ("exec", ["k"], {}, "store operation 'exec'; known are set, get, wait"),
        ("set", [], {}, "store operation set with 0 keys; it takes one"),
        ("add", ["a", "b"], {}, "store operation add with 2 keys"),
        ("get", [], {}, "store operation get with 0 keys"),
        ("get", ["text", "b"], {}, "store operation get with 2 keys"),
        ("add", ["text"], {"amount": 1}, "store key 'text' holds b'abc', which add cannot count with"),
        ("add", ["n"], {"amount": MAX_SEQ}, f"store key 'n' would become {MAX_SEQ + 1}; the limit is {MAX_SEQ}"),
    ],
    ids=["unknown", "no key", "two keys", "get of none", "get of two", "add to text", "add beyond 63 bits"],
)
def test_a_bad_request_is_refused_and_changes_nothing(
    store: Store, op: str, keys: Sequence[str], fields: dict[str, object], words: str
) -> None:
    store.reply("set", "text", value=b"abc")
    store.reply("set", "n", value=b"1")
    with pytest.raises(BadFrameError, match=words):
        store.ask(op, *keys, **fields)  # type: ignore[arg-type]  # as above
    assert store.state.values == {"text": b"abc", "n": b"1"}
    assert store.state.next_deadline() is None


def test_many_values_come_in_the_order_of_their_keys(store: Store) -> None:
    assert store.ask("get_many", "b", "a", "b", connection=B) == []
    assert len(store.ask("set", "a", value=b"1")) == 1
    assert store.ask("set", "b", value=b"2")[1] == (B, StoreReply(request_id=1, values=(b"2", b"1", b"2")))
    assert store.reply("get_many", "a").values == (b"1",)
    assert store.reply("get_many").values == ()


def test_many_values_are_the_first_that_fit_a_reply(store: Store) -> None:
    half = bytes(MAX_STORE_VALUE_BYTES // 2)
    for key, value in {"full": bytes(MAX_STORE_VALUE_BYTES), "half": half, "small": b"s"}.items():
        store.reply("set", key, value=value)
    assert [len(value) for value in store.reply("get_many", "full", "small").values] == [MAX_STORE_VALUE_BYTES]
    assert store.reply("get_many", "small", "half", "half", "small").values == (b"s", half)
    for reply in (store.reply("get_many", *["half"] * 9), store.reply("get_many", *["small"] * 4096)):
        assert len(pack_record(reply)) < MAX_RECORD_BYTES


def test_many_keys_are_deleted_at_once(store: Store) -> None:
    for key in "abc":
        store.reply("set", key, value=b"")
    assert store.reply("delete", "a", "c", "absent", "a").amount == 2
    assert list(store.state.values) == ["b"]
    assert store.reply("delete").amount == 0


def test_a_key_that_goes_again_is_missed_by_those_who_wait(store: Store) -> None:
    assert store.ask("wait", "a", "b", "a", connection=B) == []
    for _ in range(2):
        assert len(store.ask("set", "a")) == 1
        assert len(store.ask("set", "a", value=b"over")) == 1
        assert store.reply("delete", "a").amount == 1
    assert len(store.ask("set", "b")) == 1
    assert [connection for connection, _ in store.ask("set", "a")] == [A, B]
