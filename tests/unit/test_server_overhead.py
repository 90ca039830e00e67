"""What the server adds to a request: nothing is done twice, nobody waits for what need not be."""

from __future__ import annotations

import asyncio
import socket

from fluxmesh_coordinator.server.run import listening


def test_an_answer_does_not_wait_until_its_head_is_acknowledged() -> None:
    async def has_no_delay() -> bool:
        accepted: asyncio.Queue[asyncio.BaseTransport] = asyncio.Queue()

        class Server(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.put_nowait(transport)

        with listening("127.0.0.1", 0) as listener:
            server = await asyncio.get_running_loop().create_server(Server, sock=listener)
            async with server:
                _, writer = await asyncio.open_connection(*listener.getsockname())
                transport = await accepted.get()
                connection = transport.get_extra_info("socket")
                answer = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                transport.close()
        return bool(answer)

    assert asyncio.run(has_no_delay())
