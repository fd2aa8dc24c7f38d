"""A server that speaks openpi's protocol and HTTP's `/healthz`, and stalls by the clock."""

import argparse
import asyncio
import time
from http import HTTPStatus

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from policy_client import pack

EVERY_S, STALL_S, SERVICE_S = 10.0, 1.0, 0.002


async def _answer(connection: ServerConnection) -> None:
    await connection.send(pack({"policy": "stalling"}))
    answer = pack({"actions": np.ones((4, 2), np.float32)})
    try:
        while True:
            await connection.recv()
            now_s = time.monotonic()
            await asyncio.sleep(max(STALL_S - now_s % EVERY_S, 0.0) + SERVICE_S)
            await connection.send(answer)
    except ConnectionClosed:
        pass


async def _main(port: int) -> None:
    def healthz(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    async with serve(_answer, "127.0.0.1", port, process_request=healthz, compression=None):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(_main(parser.parse_args().port))
