"""An HTTP server that does nothing but answer, `python -m benchmarks.hot.trivial PORT`: the generator's ceiling."""

from __future__ import annotations

import asyncio
import re
import sys

ANSWER = bytes(2500)  # 500 scores and status codes
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Trivial(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport, self._got = transport, b""
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        length = _LENGTH.search(self._got, 0, head + 2) if head >= 0 else None
        if length and len(self._got) >= head + 4 + int(length[1]):
            self._got = b""
            self._transport.write(self._answer)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Trivial, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
