"""The proxy does what its faults say, before an echo server that remembers what it got."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from embedq_sdk.dev.ports import HOST
from tests.helpers.support import patient, wait_for
from tests.helpers.tcp_proxy import Faults, TcpProxy, Way


class Echo:
    """Answers every byte with itself."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.received = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # else the thread in `accept` would keep it open
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(65536):
                    self.received += data
                    peer.sendall(data)
            except OSError:
                pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    with suppress(OSError):  # a test closed it already
        server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy(HOST, echo.port) as running:
        yield running


@contextmanager
def client(proxy: TcpProxy) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, proxy.port), timeout=patient(10)) as connected:
        yield connected


def exactly(peer: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        data = peer.recv(size - len(found))
        if not data:
            break
        found += data
    return bytes(found)


def ask(peer: socket.socket, data: bytes) -> bytes:
    peer.sendall(data)
    return exactly(peer, len(data))


def stays_silent(peer: socket.socket) -> bool:
    """No answer for a while that a working echo never needs."""
    before = peer.gettimeout()
    peer.settimeout(0.3)
    try:
        peer.recv(1)
    except TimeoutError:
        return True
    finally:
        peer.settimeout(before)
    return False


def test_without_faults_it_only_forwards_and_passes_on_the_end(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        large = bytes(range(256)) * 4096
        sender = threading.Thread(target=peer.sendall, args=(large,))
        sender.start()
        assert exactly(peer, len(large)) == large
        sender.join()
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
    wait_for(lambda: proxy.open_connections == 0, what="the end of the connection")
    assert proxy.accepted == 1


def test_cut_resets_what_is_open_and_refuses_what_is_new_until_it_is_healed(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        assert ask(peer, b"before") == b"before"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    with pytest.raises(ConnectionRefusedError), client(proxy):
        pass
    proxy.heal()
    with client(proxy) as peer:
        assert ask(peer, b"after") == b"after"


def test_refuse_leaves_open_connections_alone(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        assert ask(peer, b"one") == b"one"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError), client(proxy):
            pass
        assert ask(peer, b"two") == b"two"


def test_reset_ends_open_connections_and_takes_new_ones(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        assert ask(peer, b"x") == b"x"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    with client(proxy) as peer:
        assert ask(peer, b"y") == b"y"


def test_delay_makes_every_answer_late_by_both_directions(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        assert ask(peer, b"x") == b"x"
        proxy.delay(0.15)
        started = time.monotonic()
        assert ask(peer, b"y") == b"y"
        assert time.monotonic() - started >= 0.3


def test_what_waits_for_a_delay_goes_on_at_once_when_it_is_healed(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        proxy.delay(3600)
        peer.sendall(b"x")
        assert stays_silent(peer)
        proxy.heal()
        assert exactly(peer, 1) == b"x"


def test_drip_lets_bytes_through_at_its_rate(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        proxy.drip(1000)
        started = time.monotonic()
        assert ask(peer, b"x" * 300) == b"x" * 300
        assert time.monotonic() - started >= 0.25


def test_half_open_accepts_and_swallows_and_the_broken_stream_is_reset_when_it_is_healed(
    proxy: TcpProxy, echo: Echo
) -> None:
    with client(proxy) as old:
        assert ask(old, b"before") == b"before"
        proxy.half_open()
        old.sendall(b"lost")
        with client(proxy) as new:
            new.sendall(b"lost too")
            assert stays_silent(old)
            assert stays_silent(new)
            proxy.heal()
            with pytest.raises(ConnectionResetError):
                old.recv(1)
            with pytest.raises(ConnectionResetError):
                new.recv(1)
    assert bytes(echo.received) == b"before"
    with client(proxy) as peer:
        assert ask(peer, b"after") == b"after"


def test_a_connection_that_lost_nothing_survives_a_half_open_spell(proxy: TcpProxy) -> None:
    with client(proxy) as peer:
        assert ask(peer, b"before") == b"before"
        proxy.half_open()
        proxy.heal()
        assert ask(peer, b"after") == b"after"


def test_held_requests_arrive_late_and_whole(proxy: TcpProxy, echo: Echo) -> None:
    with client(proxy) as peer:
        proxy.hold_requests()
        peer.sendall(b"late")
        assert stays_silent(peer)
        assert not echo.received
        proxy.heal()
        assert exactly(peer, 4) == b"late"


def test_held_answers_belong_to_requests_that_did_arrive(proxy: TcpProxy, echo: Echo) -> None:
    with client(proxy) as peer:
        proxy.hold_answers()
        peer.sendall(b"done")
        wait_for(lambda: bytes(echo.received) == b"done", what="the request at the server")
        assert stays_silent(peer)
        proxy.heal()
        assert exactly(peer, 4) == b"done"


def test_one_direction_can_be_swallowed_alone(proxy: TcpProxy, echo: Echo) -> None:
    proxy.set(Faults(down=Way.DROP))
    with client(proxy) as peer:
        peer.sendall(b"heard")
        wait_for(lambda: bytes(echo.received) == b"heard", what="the request at the server")
        assert stays_silent(peer)


def test_a_server_that_is_gone_is_a_reset_and_one_that_comes_back_is_found(
    proxy: TcpProxy, echo: Echo
) -> None:
    echo.close()
    with pytest.raises(ConnectionResetError), client(proxy) as peer:  # at once, or at the first byte
        peer.recv(1)
    other = Echo()
    proxy.point_to(HOST, other.port)
    with client(proxy) as peer:
        assert ask(peer, b"x") == b"x"
    other.close()


def test_faults_replace_each_other(proxy: TcpProxy) -> None:
    proxy.cut()
    proxy.delay(0.0)
    with client(proxy) as peer:
        assert ask(peer, b"x") == b"x"
    assert proxy.faults == Faults()


def test_closing_ends_connections_and_closing_twice_does_nothing(echo: Echo) -> None:
    proxy = TcpProxy(HOST, echo.port)
    proxy.start()
    with client(proxy) as peer:
        assert ask(peer, b"x") == b"x"
        proxy.close()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    proxy.close()
