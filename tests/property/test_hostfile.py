"""The grammar of hosts: what is valid is read back as it was meant, and nothing whatever gives more than hosts or a ConfigError."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.host_texts import reading

from zspmd.errors import ConfigError, HostfileError
from zspmd.runtime.launch.hosts.host import MAX_HOSTS, Host
from zspmd.runtime.launch.hosts.host_lists import allocation_hosts, parse_host_list, parse_hosts
from zspmd.runtime.launch.hosts.host_ranges import expand_ranges
from zspmd.runtime.launch.hosts.host_selection import select_hosts
from zspmd.runtime.launch.hosts.hostfile import parse_hostfile

QUICK = settings(deadline=None, max_examples=100)

labels = st.from_regex(r"[a-z][a-zA-Z0-9_-]{0,12}(\.[a-z0-9]{1,8}){0,2}", fullmatch=True)
addresses = (
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
    .filter(lambda address: not (address.is_multicast or address.is_unspecified or str(address) == "255.255.255.255"))
    .map(str)
)
names = st.one_of(labels, addresses)
users = st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True)
ifaces = st.one_of(st.from_regex(r"[a-z]{1,5}[0-9]{0,3}", fullmatch=True), st.just("10.1.0.0/16"), st.just("2001:db8::/32"))


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    devices = draw(st.none() | st.lists(st.integers(0, 9999), min_size=1, max_size=4).map(tuple))
    slots = draw(st.integers(1, len(devices))) if devices else draw(st.none() | st.integers(1, 1 << 16))
    return Host(
        draw(names),
        slots=slots,
        user=draw(st.none() | users),
        port=draw(st.none() | st.integers(1, 65_535)),
        addr=draw(st.none() | addresses),
        iface=draw(st.none() | ifaces),
        devices=devices,
        python=draw(st.none() | st.sampled_from(["python3", "/opt/my.venv/bin/python3.12"])),
        max_slots=draw(st.none() | st.integers(slots or 1, 1 << 16)),
    )


groups = st.lists(hosts(), min_size=1, max_size=6, unique_by=lambda host: host.key)
blanks = st.text(" \t", max_size=2)


@st.composite
def spelt(draw: st.DrawFn, host: Host) -> str:
    """Write a host in one of the ways that mean it."""
    name = f"[{host.name}]" if ":" in host.name and draw(st.booleans()) else host.name
    keys = {
        field: value for field in ("port", "addr", "iface", "python", "max_slots", "user") if (value := getattr(host, field)) is not None
    }
    if host.user and draw(st.booleans()):
        name = f"{keys.pop('user')}@{name}"
    if host.slots is not None:
        is_short = host.slots < 1024 and host.slots != 22 and (":" not in host.name or "]" in name)
        if is_short and draw(st.booleans()):
            name += f":{host.slots}"
        else:
            keys[draw(st.sampled_from(["slots", "cpu", "count", "np"]))] = host.slots
    if host.devices:
        keys["devices"] = ",".join(map(str, host.devices))
    pairs = [f"{key}{draw(blanks)}={draw(blanks)}{value}" for key, value in draw(st.permutations(list(keys.items())))]
    comment = draw(st.sampled_from(["", " # x", "\t//x", " #"]))
    return draw(blanks) + (draw(st.sampled_from([" ", "\t", "   "]))).join([name, *pairs]) + draw(blanks) + comment


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[Host]]:
    """Return a hostfile and what it says."""
    group = draw(groups)
    end = draw(st.sampled_from(["\n", "\r\n"]))
    fillers = st.sampled_from(["", " ", "# c", "\t# h slots=2", "//"])
    lines = [line for host in group for line in (*draw(st.lists(fillers, max_size=2)), draw(spelt(host)))]
    return draw(st.sampled_from(["", "\ufeff"])) + end.join(lines) + draw(st.sampled_from(["", end])), group


def placeless(found: list[Host]) -> list[Host]:
    return [replace(host, where="") for host in found]


@QUICK
@given(files())
def test_a_valid_file_says_what_was_meant(file: tuple[str, list[Host]]) -> None:
    text, group = file
    assert placeless(parse_hostfile(text, "hosts")) == group


@QUICK
@given(groups)
def test_what_is_shown_of_hosts_is_a_hostfile(group: list[Host]) -> None:
    assert placeless(parse_hostfile("\n".join(reading(group)), "hosts")) == group
    assert placeless(parse_hosts(reading(group))) == group


@QUICK
@given(groups, st.lists(st.integers(0, 5), max_size=12))
def test_repeats_count_slots_and_stay_together(group: list[Host], order: list[int]) -> None:
    places = [*range(len(group)), *(place % len(group) for place in order)]
    found = parse_hostfile("\n".join(group[place].name for place in places), "hosts")
    assert [host.name for host in found] == [host.name for host in group]
    assert [host.slots or 1 for host in found] == [places.count(place) for place in range(len(group))]


@QUICK
@given(groups, st.lists(st.integers(0, 900), min_size=6, max_size=6))
def test_a_list_says_what_was_meant(group: list[Host], numbers: list[int]) -> None:
    text = ",".join(f"[{host.name}]:{n}" if ":" in host.name else f"{host.name}:{n}" for host, n in zip(group, numbers))
    expected = [(host.name, n) for host, n in zip(group, numbers) if n and n != 22]
    try:
        assert [(host.name, host.slots) for host in parse_host_list(text)] == expected
    except HostfileError:
        assert 22 in numbers[: len(group)] or not expected


hostile = st.one_of(st.text(max_size=80), st.text("h1n.:@[]^=# \t\r\n,-/%0slotpu\ufeff\0", max_size=80))


def check_error(error: HostfileError) -> None:
    assert error.problems
    assert all(line >= 0 and column >= 0 and rule for line, column, rule in error.problems)
    assert len(str(error).split("\n")) == len(error.problems), "one line for each"


def check_outcome(parse: Callable[[], list[Host]]) -> None:
    """Anything but hosts or a HostfileError is raised."""
    try:
        found = parse()
    except HostfileError as error:
        check_error(error)
    else:
        assert found
        assert len({host.key for host in found}) == len(found) <= MAX_HOSTS
        assert not any(host.name.startswith("-") for host in found)


def check_text(text: str) -> None:
    check_outcome(lambda: parse_hostfile(text, "hosts"))
    check_outcome(lambda: parse_host_list(text))
    check_outcome(lambda: parse_hosts([text]))


@QUICK
@given(hostile)
@example("h slots=" + "9" * 5000)
@example("n[1-999999999]" * 4)
@example("[::1%]")
def test_any_text_gives_hosts_or_what_is_wrong_with_it(text: str) -> None:
    check_text(text)


@QUICK
@given(
    files(),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.text("h1[]:@=^#, \n-0\u0661", max_size=3)), min_size=1, max_size=4),
)
def test_a_damaged_file_gives_hosts_or_what_is_wrong_with_it(file: tuple[str, list[Host]], damages: list[tuple[int, int, str]]) -> None:
    text = file[0]
    for place, length, piece in damages:
        at = place % (len(text) + 1)
        text = text[:at] + piece + text[at + length :]
    check_text(text)


@st.composite
def node_lists(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Return a list as Slurm writes it, and its names."""
    texts, found = [], []
    for place in range(draw(st.integers(1, 3))):
        width = draw(st.integers(1, 4))
        numbers = sorted(draw(st.sets(st.integers(0, 10**width - 1), min_size=1, max_size=8)))
        prefix, suffix = f"n{'abc'[place]}", draw(st.sampled_from(["", "-ib"]))
        runs: list[list[int]] = []
        for number in numbers:
            if runs and runs[-1][1] == number - 1 and draw(st.booleans()):
                runs[-1][1] = number
            else:
                runs.append([number, number])
        parts = [f"{first:0{width}}-{last:0{width}}" if first < last else f"{first:0{width}}" for first, last in runs]
        texts.append(f"{prefix}[{','.join(parts)}]{suffix}")
        found += [f"{prefix}{number:0{width}}{suffix}" for number in numbers]
    return ",".join(texts), found


@QUICK
@given(node_lists(), st.data())
def test_slurms_lists_and_counts(nodes: tuple[str, list[str]], data: st.DataObject) -> None:
    text, expected = nodes
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(expected), max_size=len(expected)))
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    tasks = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    found = allocation_hosts({"SLURM_JOB_NODELIST": text, "SLURM_TASKS_PER_NODE": tasks})
    assert [(host.name, host.slots) for host in found or []] == list(zip(expected, counts))


@QUICK
@given(hostile, hostile)
def test_any_environment_of_slurm_gives_hosts_or_what_is_wrong_with_it(nodes: str, tasks: str) -> None:
    for environment in (
        {"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks},
        {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": tasks},
        {"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS_PER_NODE": tasks},
    ):
        if environment["SLURM_JOB_NODELIST"]:
            check_outcome(lambda given=environment: allocation_hosts(given) or [])  # type: ignore[misc]  # mypy infers no lambda defaults


@QUICK
@given(st.text("n1[]-,0", max_size=20), st.integers(0, 50))
def test_ranges_never_give_more_than_there_is_room_for(text: str, room: int) -> None:
    try:
        found = expand_ranges(text, room)
    except ConfigError:
        return
    assert 1 <= len(found) <= room
    assert len(set(found)) == len(found)


counted = st.lists(hosts().map(lambda host: replace(host, slots=host.slots or 1)), min_size=1, max_size=5, unique_by=lambda host: host.key)


@QUICK
@given(counted, st.data())
def test_what_is_included_and_what_is_excluded_are_the_whole(group: list[Host], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(group), unique_by=lambda host: host.key, min_size=1))
    text = "@".join(f"[{host.name}]" if ":" in host.name and data.draw(st.booleans()) else host.name for host in chosen)
    kept = select_hosts(group, include=text)
    assert kept == [host for host in group if host in chosen]
    if len(kept) < len(group):
        left = select_hosts(group, exclude=text)
        assert left == [host for host in group if host not in chosen]
        assert left == select_hosts(group, include="@".join(f"^{entry}" for entry in text.split("@")))


@QUICK
@given(st.integers(1, 8), st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_slots_are_counted_before_any_is_taken(num_slots: int, wanted: set[int], unwanted: set[int]) -> None:
    include, exclude = (sorted(slot for slot in slots if slot < num_slots) for slots in (wanted, unwanted))
    left = [slot for slot in include or range(num_slots) if slot not in exclude]
    selection = {"include": f"h:{','.join(map(str, include))}" if include else "h"}
    if exclude:
        selection["exclude"] = f"h:{','.join(map(str, exclude))}"
    host = Host("h", slots=num_slots, devices=tuple(range(10, 10 + num_slots)))
    try:
        (found,) = select_hosts([host], **selection)  # type: ignore[arg-type]  # num_nodes is not among its keys
    except ConfigError:
        assert not left
    else:
        assert found.devices == tuple(slot + 10 for slot in left)


@QUICK
@given(groups, hostile, hostile)
def test_any_selection_gives_hosts_or_what_is_wrong_with_it(group: list[Host], include: str, exclude: str) -> None:
    for selection in ({"include": include}, {"exclude": exclude}, {"include": f"{group[0].name}@{include}", "exclude": exclude}):
        try:
            found = select_hosts(group, **selection)  # type: ignore[arg-type]  # as above
        except ConfigError:
            continue
        keys = [host.key for host in found]
        assert keys
        assert keys == [host.key for host in group if host.key in keys]
