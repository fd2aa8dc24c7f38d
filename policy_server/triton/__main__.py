"""The command line `python -m policy_server.triton`: a Triton server without a container."""

import argparse
import os
import sys
from pathlib import Path

from policy_server.errors import StartupError
from policy_server.triton.launch import server_command


def main() -> None:
    """Become the server."""
    parser = argparse.ArgumentParser(
        prog="python -m policy_server.triton",
        description="Run Triton on this machine's CPU, from the wheel nvidia-pytriton. Words that are not listed here "
        "are passed on to tritonserver. Models are loaded when a gateway asks for them (policy-server serve "
        "--engine triton), or with --load-model=NAME.",
    )
    parser.add_argument("repository", type=Path, help="a repository that `policy-server export triton` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="KServe v2 over gRPC (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8003, help="KServe v2 over HTTP (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="Prometheus (default: %(default)s)")
    arguments, others = parser.parse_known_args()
    if not arguments.repository.is_dir():
        parser.error(f"{arguments.repository} is no folder; policy-server export triton BUNDLE -o FOLDER makes one")
    try:
        command = server_command(
            arguments.repository,
            Path(sys.prefix) / "triton-backends",
            grpc_port=arguments.grpc_port,
            http_port=arguments.http_port,
            metrics_port=arguments.metrics_port,
            host=arguments.host,
            options=others,
        )
    except StartupError as error:
        parser.error(str(error))
    os.execve(command.words[0], command.words, dict(command.environment))  # noqa: S606


if __name__ == "__main__":
    main()
