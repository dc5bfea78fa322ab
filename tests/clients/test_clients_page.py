"""The programs of docs/clients.md, and the Node.js client, run against a server with the shipped models.

grpcurl's lines are answered by its like: what the server says of itself by reflection, and the JSON that they send.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.conftest import ROOT, ServerProcess

TRITON = Path(sys.prefix) / "triton" / "bin" / "python"
NODE_MODULES = Path(sys.prefix) / "node" / "node_modules"
DOCUMENTED = "127.0.0.1:50051"
PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS: dict[str, str] = dict(
    re.findall(r"^## (.+?)\n(?:(?!^## ).)*?```\w+\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
)

needs_triton = pytest.mark.skipif(
    not TRITON.exists(), reason="no environment for tritonclient: `make test` makes .venv/triton"
)
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not NODE_MODULES.exists(),
    reason="no Node.js, or no packages for it: `make test` makes .venv/node where there is npm",
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process = ServerProcess(ROOT / "models")
    yield process.address
    process.stop()


def run(*command: str, cwd: Path = ROOT) -> str:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def node_directory(tmp_path: Path) -> Path:
    """As clients/node is after `npm install`."""
    directory = tmp_path / "clients" / "node"
    shutil.copytree(ROOT / "clients" / "node", directory, ignore=shutil.ignore_patterns("node_modules"))
    (directory / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    return directory


def test_every_client_of_the_page_is_tried() -> None:
    assert set(BLOCKS) == {
        "Ours",
        "tritonclient, unary",
        "tritonclient, asyncio",
        "tritonclient, a stream",
        "grpcurl",
        "Node.js",
    }


def test_our_client_runs_as_it_is_pasted(address: str) -> None:
    assert run(sys.executable, "-c", BLOCKS["Ours"].replace(DOCUMENTED, address)) == "(5, 8)\n"


@needs_triton
@pytest.mark.parametrize(
    ("heading", "printed"),
    [
        ("tritonclient, unary", "(1, 8)\n"),
        ("tritonclient, asyncio", "(1, 5, 8)\n"),
        ("tritonclient, a stream", "(1, 8)\n" * 5),
    ],
)
def test_tritonclient_runs_as_it_is_pasted(address: str, heading: str, printed: str) -> None:
    assert run(str(TRITON), "-c", BLOCKS[heading].replace(DOCUMENTED, address)) == printed


def test_what_grpcurl_sends_is_found_by_reflection_and_answered(address: str) -> None:
    answers = {}
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        for line in BLOCKS["grpcurl"].splitlines():
            program, plaintext, *arguments = shlex.split(line)
            assert (program, plaintext) == ("grpcurl", "-plaintext")
            if arguments == [DOCUMENTED, "list"]:
                answers["list"] = [*database.get_services()]
                continue
            data, sent, asked, path = arguments
            assert (data, asked) == ("-d", DOCUMENTED)
            service, name = path.split("/")
            method = pool.FindServiceByName(service).methods_by_name[name]
            request = json_format.Parse(sent, GetMessageClass(method.input_type)())
            call = channel.unary_unary(
                f"/{path}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            answers[name] = json_format.MessageToDict(call(request, timeout=30))

    assert {"ntm.v1.SessionService", "inference.GRPCInferenceService"} <= {*answers["list"]}
    assert answers["Step"]["outputs"]["shape"] == ["1", "8"]
    assert answers["ModelInfer"]["outputs"][0]["shape"] == ["1", "8"]


@needs_node
def test_node_runs_as_it_is_pasted(address: str, node_directory: Path) -> None:
    (node_directory / "pasted.mjs").write_text(BLOCKS["Node.js"].replace(DOCUMENTED, address))

    assert run("node", "pasted.mjs", cwd=node_directory) == "[ 1, 8 ]\n"


@needs_node
def test_the_node_client_copies_over_both_services_bit_for_bit_alike(
    address: str, node_directory: Path
) -> None:
    printed = run("node", "copy.mjs", address, "20", cwd=node_directory)

    assert printed == (
        "ntm.v1: 0 of 160 bits wrong\n"
        "inference: 0 of 160 bits wrong\n"
        "both services gave the same, bit for bit\n"
    )
