"""A host that a program makes: the same rules as in a hostfile."""

from __future__ import annotations

from typing import Any

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.launch.hosts.host import Host


def test_a_host_has_a_target_and_a_key() -> None:
    assert (Host("Node1").target, Host("Node1").key) == ("Node1", "node1")
    assert (Host("2001:DB8:0::1", user="lee").target, Host("2001:DB8:0::1").key) == ("lee@2001:DB8:0::1", "2001:db8::1")
    assert Host("fe80::1%eth0").key != Host("fe80::1%eth1").key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "'' is no host name"),
        ({"name": "-oProxyCommand=reboot"}, "'-oProxyCommand=reboot' is no host name"),
        ({"name": "[fe80::1]"}, "'[fe80::1]' is no IPv6 address"),
        ({"name": "n[1-3]"}, "'n[1-3]' is no host name"),
        ({"name": "h", "slots": 0}, "slots='0' is outside 1 to 65536"),
        ({"name": "h", "slots": True}, "slots='True' is outside"),
        ({"name": "h", "slots": 2, "max_slots": 1}, "slots=2 is more than max_slots=1"),
        ({"name": "h", "port": 65_536}, "port='65536' is outside 1 to 65535"),
        ({"name": "h", "user": "-l"}, "'-l' is no user's name"),
        ({"name": "h", "python": "$(reboot)"}, "cannot be used"),
        ({"name": "h", "addr": "g"}, "addr='g' is no IP address"),
        ({"name": "h", "iface": "a b"}, "iface='a b' is no interface"),
        ({"name": "h", "devices": (-1,)}, "devices='-1' is outside 0 to 9999"),
        ({"name": "h", "devices": ("0",)}, "devices='0' is outside 0 to 9999"),
        ({"name": "h", "slots": 2, "devices": (0,)}, "slots=2 and devices has 1"),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_host_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Host(**fields)
    assert message in str(caught.value)
