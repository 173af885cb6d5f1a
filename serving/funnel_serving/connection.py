"""One connection of a client: uvicorn's, with limits that it does not have."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """Ends connections whose client sends too slowly, sends too many headers, or does not read.

    A request must arrive within `seconds` of its first byte, and the first one of the connection; a reply must be read
    within `seconds`. Where the application reads the body and will answer 408 itself, it does.
    """

    seconds: float  # set by a subclass, because uvicorn makes the connections

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._has_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._has_headers
        super().data_received(data)
        if not before and not self._has_headers and not self.transport.is_closing():
            self._header_bytes += len(data)  # a header without an end never reaches `on_header`
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"the headers have more than {MAX_HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes, self._has_headers = 0, False
        self._wait_for_request()

    def on_headers_complete(self) -> None:
        self._has_headers = True
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEADER_BYTES:
            self._refuse(431, f"the headers have more than {MAX_HEADER_BYTES} bytes")
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        if self.cycle is not None:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:
            super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.seconds, self._end_unless_read)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # a client that does not read what is left would hold the connection for ever

    def _wait_for_request(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.seconds, self._end_slow_request)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_slow_request(self) -> None:
        if self.cycle is None or not self._has_headers:
            self._refuse(408, f"the request did not come within {self.seconds:g} s")
        elif self.cycle.response_complete:  # the rest of a body that was refused
            self.transport.abort()
        else:
            self._wait_for_request()  # the application is about to refuse it

    def _end_unless_read(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answers in the name of the application, which does not see the request."""
        reason = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}[status]
        head = b"HTTP/1.1 %d %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n" % (
            status,
            reason,
            len(message),
        )
        self.transport.write(head + b"connection: close\r\n\r\n" + message.encode())
        self.transport.close()
