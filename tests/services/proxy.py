"""A network that fails: a TCP proxy that delays, resets and cuts connections as told."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time

__all__ = ["Proxy"]


class Proxy:
    """Passes bytes on unchanged between a free port of the loopback and a server.

    Unchanged, as a request's signature covers its Host header: clients sign for the proxy.

    Attributes:
        latency_s: every piece of an answer is delayed by this.
        reset_probability: with this, a piece of either direction is lost and both ends are reset.
        cut_probability: with this, a piece of an answer longer than ``cut_after`` bytes ends there.
        faults: how many connections were reset or cut.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self._target = ("127.0.0.1", port)
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.latency_s = self.reset_probability = self.cut_probability = 0.0
        self.cut_after = 1000
        self.faults = 0
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.up()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Accept connections, on the same port as before."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and end those that there are."""
        if self._listener is not None:
            # A thread in accept() keeps the socket open unless it is shut down.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            ends = list(self._open)
        for end in ends:
            self._end(end, reset=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, 10)
            except OSError:
                self._end(client, reset=True)
                continue
            for end in (client, server):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._pass_on, args=(source, sink, answers), daemon=True
                ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        fault = False
        try:
            while data := source.recv(65536):
                if answers:
                    time.sleep(self.latency_s)
                if self._chance(self.reset_probability):
                    fault = True
                    break
                if answers and len(data) > self.cut_after and self._chance(self.cut_probability):
                    sink.sendall(data[: self.cut_after])
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            self._end(end, fault)

    def _chance(self, probability: float) -> bool:
        with self._lock:
            happens = self._random.random() < probability
            self.faults += happens
        return happens

    def _end(self, end: socket.socket, reset: bool) -> None:
        with self._lock:
            self._open.discard(end)
        with contextlib.suppress(OSError):
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Wakes the thread that reads from it, which would else keep the socket open.
            end.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        end.close()
