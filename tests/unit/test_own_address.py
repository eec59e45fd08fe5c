"""By which address the machines of launch/cloud.sh meet."""

import socket

import psutil
import pytest

from atr_scale.machine_ranks import own_address


def test_of_the_first_machine() -> None:
    addresses = [
        each.address for found in psutil.net_if_addrs().values() for each in found if each.family == socket.AF_INET
    ]
    outside = [address for address in addresses if not address.startswith("127.")]
    if not outside:
        pytest.skip("this machine has no network")
    assert own_address(f"{outside[0]}:29500") == (outside[0], "localhost:29500")


@pytest.mark.parametrize("place", ["127.0.0.1:29500", "localhost:29500", "no-such-machine.invalid:29500"])
def test_that_others_cannot_use(place: str) -> None:
    assert own_address(place) == (None, place)
