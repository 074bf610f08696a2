"""Several machines: whether this one reaches the main one, and over which interface."""

import os
import socket
import time
from collections.abc import Callable

import psutil

# What accelerate takes where no port is given.
DEFAULT_PORT = 29500
# A machine that does not answer at all is given up after this time, within the minute that people wait for a message.
_NO_ANSWER = 45.0
# One that answers that nothing listens there yet may be started by hand: it gets longer.
_NOT_STARTED = 600.0
# An address that is kept for documentation: the way to it is the default route.
_ELSEWHERE = "192.0.2.1"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def set_interface(address: str) -> None:
    """Let gloo and NCCL use the interface that leads to the main machine, unless the user has named one.

    gloo takes by default the one of this machine's host name, which is often the loopback. NCCL takes the first of its
    own order.
    """
    # A machine's own name is often the loopback to itself, in /etc/hosts. The others come over the default route then.
    name = interface_to(address) or interface_to(_ELSEWHERE)
    if name is not None:
        for variable in _INTERFACES:
            os.environ.setdefault(variable, name)


def interface_to(address: str) -> str | None:
    """The network interface over which this machine sends to `address`; None for no route, and for the loopback."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram socket: looks up the route, and sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if not name.startswith("lo") and any(found.address.partition("%")[0] == own for found in addresses):
            return name
    return None


def wait_for_main_machine(
    address: str,
    port: int,
    say: Callable[[str], None],
    no_answer: float = _NO_ANSWER,
    not_started: float = _NOT_STARTED,
) -> None:
    """Return when something listens at the main machine's port.

    Args:
        address, port: `--main_process_ip` and `--main_process_port`.
        say: gets a line when nothing listens there yet.
        no_answer: seconds after which a machine that does not answer is given up.
        not_started: the same for one that answers that nothing listens.

    Raises:
        ConnectionError: naming address and port.
    """
    began = time.monotonic()
    limit, has_said = no_answer, False
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except ConnectionRefusedError as error:
            problem, limit = error, not_started
            if not has_said and time.monotonic() - began > 5:
                say(f"Waiting for the main machine: {address} answers, and nothing listens at port {port} yet.")
                has_said = True
        except OSError as error:  # no such name, no route, no answer
            problem = error
        if time.monotonic() - began > limit:
            raise ConnectionError(
                f"--main_process_ip {address}: this machine cannot reach it at port {port} ({problem}). Expected "
                "machine 0 to listen there; is it started, is its address right, and is the port open in its firewall?"
            )
        time.sleep(1)
