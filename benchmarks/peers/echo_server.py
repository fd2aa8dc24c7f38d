"""The least that a websocket server can do: reads a message, sends the same bytes for every one."""

import argparse
import asyncio
import http

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from benchmarks.processes import HOST


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--metadata-bytes", type=int, required=True, help="size of the first message")
    parser.add_argument("--reply-bytes", type=int, required=True, help="size of every reply")
    arguments = parser.parse_args()
    asyncio.run(_run(arguments.port, bytes(arguments.metadata_bytes), bytes(arguments.reply_bytes)))


async def _run(port: int, metadata: bytes, reply: bytes) -> None:
    async def answer(connection: ServerConnection) -> None:
        await connection.send(metadata)
        async for _ in connection:
            await connection.send(reply)

    async with serve(answer, HOST, port, compression=None, max_size=None, process_request=_health) as server:
        await server.serve_forever()


def _health(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


if __name__ == "__main__":
    main()
