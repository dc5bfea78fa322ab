"""`python -m server.rpc.health [HOST:PORT]`: ask a server how it is; exit status 0 when it serves.

For container health checks, so that the image needs no other program. Without an address it asks the one that
this environment's server tells health on.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 2.0


def main() -> int:
    """Ask; returns 0 for SERVING, 1 for anything else, and prints the answer."""
    listen = os.environ.get("NTM_SERVER_HEALTH_LISTEN") or os.environ.get(
        "NTM_SERVER_LISTEN", "127.0.0.1:50051"
    )
    host, _, port = listen.rpartition(":")
    own_address = f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else listen  # noqa: S104  # nosec B104  # looked for, not bound to
    address = sys.argv[1] if len(sys.argv) > 1 else own_address
    with grpc.insecure_channel(address) as channel:
        try:
            # The types that come with grpc_health leave out the stub's methods.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}: {error.details()}")
            return 1
    print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
