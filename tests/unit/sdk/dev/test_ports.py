"""Ports: the usual ones if they are free, so that a start finds them where the one before did."""

from __future__ import annotations

import socket

from embedq_sdk.dev.command import run
from embedq_sdk.dev.ports import HOST, free_ports, is_free


def test_a_wanted_port_that_is_free_comes_first() -> None:
    wanted = free_ports(3)
    assert free_ports(2, wanted) == wanted[:2]
    assert free_ports(2, wanted) == wanted[:2], "nor does asking take it"


def test_a_wanted_port_that_is_taken_gives_way_to_the_next_one_and_then_to_any() -> None:
    first, second = free_ports(2)
    with socket.create_server((HOST, first)):
        assert not is_free(first)
        assert free_ports(1, (first, second)) == [second]
        [other] = free_ports(1, (first,))
    assert other not in (first, second) or other == second
    assert is_free(first)


def test_a_port_counts_once() -> None:
    [wanted] = free_ports(1)
    ports = free_ports(3, (wanted, wanted))
    assert (ports[0], len(set(ports))) == (wanted, 3)


def test_a_health_port_that_is_taken_is_told_before_anything_starts(tmp_path: object) -> None:
    said: list[str] = []
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        assert run(model=str(tmp_path), http_port=port, echo=said.append) == 1
    assert said == [f"port {port} is in use: choose another one with --http-port, or 0 for any free one"]
