"""The way to the main machine."""

import socket
import threading
import time

import psutil
import pytest

from orpo_trl import network
from orpo_trl.network import interface_to, set_interface, wait_for_main_machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outer_interface() -> tuple[str, str]:
    """An interface of this machine that is not the loopback, and its address."""
    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family == socket.AF_INET and not name.startswith("lo"):
                return name, found.address
    pytest.skip("this machine has no network interface")


def test_interface_is_the_one_of_the_route():
    name, address = outer_interface()
    assert interface_to(address) == name


def test_loopback_is_no_way_to_other_machines():
    assert interface_to("127.0.0.1") is None


def test_interface_that_the_user_names_is_kept(monkeypatch):
    name, address = outer_interface()
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    set_interface(address)
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that the fixture removes it


def test_machine_that_starts_later_is_waited_for():
    port = free_port()
    with socket.socket() as server:

        def open_late():
            time.sleep(0.5)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()

        threading.Thread(target=open_late).start()
        wait_for_main_machine("127.0.0.1", port, say=pytest.fail, not_started=10)


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_machine_that_cannot_be_reached_is_named_with_its_port(address):
    port = free_port()
    message = f"--main_process_ip {address}: this machine cannot reach it at port {port} "
    with pytest.raises(ConnectionError, match=message):
        wait_for_main_machine(address, port, say=lambda text: None, no_answer=0.5, not_started=0.5)
