"""To a principal the sessions of others do not exist, whatever rpc it tries; on every kind of store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from server.launch import Server
from server.security.tokens import line_of
from tests.server.helpers import GONE, Start, accumulated, crash, random_inputs, refused
from tests.valkey import ValkeyServer

DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
INPUTS = random_inputs(4)
NOBODYS = "never-was"
"""As long as the ids of the sessions that there are."""
LIVING, ENDED = "of-alice1", "of-alice2"

REQUESTS: dict[str, Any] = {
    "GetSession": lambda i: pb.GetSessionRequest(session_id=i),
    "ListSessions": lambda i: pb.ListSessionsRequest(page_token=""),
    "DeleteSession": lambda i: pb.DeleteSessionRequest(session_id=i),
    "ResetSession": lambda i: pb.ResetSessionRequest(session_id=i),
    "Step": lambda i: pb.StepRequest(session_id=i, inputs=to_message(INPUTS)),
    "StreamSteps": lambda i: iter([pb.StreamStepsRequest(step=REQUESTS["Step"](i))]),
    "BatchStep": lambda i: pb.BatchStepRequest(session_ids=[i], inputs=to_message(INPUTS[np.newaxis])),
    "GetState": lambda i: pb.GetStateRequest(session_id=i),
    "WatchSession": lambda i: pb.WatchSessionRequest(session_id=i),
    "ForkSession": lambda i: pb.ForkSessionRequest(source_session_id=i, session_id="a-fork"),
    "ExportSession": lambda i: pb.ExportSessionRequest(session_id=i),
}
"""What somebody could try on a session, by its id."""
BEGINNINGS = {"CreateSession", "ImportSession"}
"""Rpcs that take ids of new sessions alone; they have tests of their own."""


class Principal:
    """A stub whose calls carry a token, or none."""

    def __init__(self, address: str, token: str = "") -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address)
        stub = session_service_pb2_grpc.SessionServiceStub(self.channel)
        metadata = [("x-request-id", "the-same-for-all")]
        if token:
            metadata.append(("authorization", f"Bearer {token}"))
        self.call = {
            rpc.name: self._with(getattr(stub, rpc.name), metadata)
            for rpc in pb.DESCRIPTOR.services_by_name["SessionService"].methods
        }

    def _with(self, rpc: Any, metadata: Any) -> Any:
        return lambda request: rpc(request, metadata=metadata, timeout=30)

    async def create(self, session_id: str = "", **fields: Any) -> Any:
        request = pb.CreateSessionRequest(model_name="accumulator", session_id=session_id, **fields)
        return (await self.call["CreateSession"](request)).session

    async def step(self, session_id: str, inputs: np.ndarray = INPUTS, **fields: Any) -> np.ndarray:
        request = pb.StepRequest(session_id=session_id, inputs=to_message(inputs), **fields)
        return to_array((await self.call["Step"](request)).outputs)

    async def delete(self, session_id: str, **fields: Any) -> None:
        await self.call["DeleteSession"](pb.DeleteSessionRequest(session_id=session_id, **fields))

    async def ids(self, **fields: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = pb.ListSessionsRequest(page_size=2, page_token=token, **fields)
            page = await self.call["ListSessions"](request)
            found += [session.session_id for session in page.sessions]
            token = page.next_page_token
            if not token:
                return found

    async def try_out(self, rpc: str, session_id: str) -> Any:
        """What comes of an rpc on a session, without the id."""
        try:
            answer = self.call[rpc](REQUESTS[rpc](session_id))
            if rpc in ("StreamSteps", "WatchSession"):
                said = [each.SerializeToString() async for each in answer]
            else:
                said = [(await answer).SerializeToString()]
        except grpc.aio.AioRpcError as error:
            trailing = [(key, value) for key, value in error.trailing_metadata() or ()]
            said = [error.code(), error.details(), trailing]
        return repr(said).replace(session_id, "ID")


@pytest_asyncio.fixture(params=["none", "sqlite", "redis"])
async def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    store = "none"
    if request.param == "sqlite":
        store = f"sqlite:///{tmp_path}/data/sessions.sqlite3"
    if request.param == "redis":
        valkey: ValkeyServer = request.getfixturevalue("valkey")
        store = valkey.url
    names = {"alice": "a-token", "bob": "b-token", "root": "r-token"}
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(line_of(name, token) for name, token in names.items()))
    return {
        "store": store,
        "sync": "normal",
        "tokens": tokens,
        "admins": "root",
        "max_resident_sessions": 16,
    }


@pytest_asyncio.fixture
async def parties(
    serve: Start, models: Path, settings: dict[str, Any]
) -> AsyncIterator[tuple[Server, Principal, Principal, Principal]]:
    """A server, Alice with a living session and one that has ended, Bob with none, and an admin."""
    server, address = await serve(models, **settings)
    alice, bob, root = (Principal(address, f"{letter}-token") for letter in "abr")
    await alice.create(LIVING, request_id="request-1")
    await alice.step(LIVING)
    await alice.create(ENDED)
    await alice.delete(ENDED)
    yield server, alice, bob, root
    for principal in (alice, bob, root):
        await principal.channel.close()


def test_every_rpc_is_tried() -> None:
    assert {rpc.name for rpc in pb.DESCRIPTOR.services_by_name["SessionService"].methods} == {
        *REQUESTS,
        *BEGINNINGS,
    }


async def test_whatever_another_principal_tries_on_a_session_is_as_if_it_had_never_been(parties: Any) -> None:
    _, alice, bob, _ = parties

    for rpc in REQUESTS:
        nothing = await bob.try_out(rpc, NOBODYS)
        assert await bob.try_out(rpc, LIVING) == nothing, rpc
        assert await bob.try_out(rpc, ENDED) == nothing, rpc

    assert (await alice.step(LIVING)).tobytes() == accumulated(np.concatenate([INPUTS, INPUTS]))[4:].tobytes()


async def test_ids_and_request_ids_of_others_can_be_taken_and_stay_apart(parties: Any) -> None:
    _, alice, bob, _ = parties

    assert (await bob.create(LIVING, request_id="request-1")).next_step == 0
    assert (await bob.create(ENDED)).next_step == 0
    await bob.step(LIVING, INPUTS[:1])

    assert (await bob.call["GetSession"](REQUESTS["GetSession"](LIVING))).session.next_step == 1
    assert (await alice.call["GetSession"](REQUESTS["GetSession"](LIVING))).session.next_step == 4
    await bob.delete(LIVING)
    assert (await alice.create(LIVING, request_id="request-1")).next_step == 4  # a repeat
    await refused(alice.create(ENDED), grpc.StatusCode.ALREADY_EXISTS, "SESSION_ID_RETIRED")


async def test_each_lists_its_own_sessions_page_by_page(parties: Any) -> None:
    _, alice, bob, _ = parties
    for number in range(4):
        await alice.create(f"s{number}")
        await bob.create(f"s{number}")
    await bob.create("zz")

    assert await alice.ids() == [LIVING, "s0", "s1", "s2", "s3"]
    assert await bob.ids(model_name="accumulator") == ["s0", "s1", "s2", "s3", "zz"]
    assert {s.owner for s in (await bob.call["ListSessions"](pb.ListSessionsRequest())).sessions} == {"bob"}


async def test_a_batch_reaches_only_the_callers_sessions(parties: Any) -> None:
    _, alice, bob, _ = parties
    await bob.create("mine")
    inputs = np.stack([INPUTS] * 3)
    request = pb.BatchStepRequest(session_ids=["mine", LIVING, NOBODYS], inputs=to_message(inputs))

    answer = await bob.call["BatchStep"](request)

    assert [(error.index, error.reason) for error in answer.errors] == [
        (1, "SESSION_NOT_FOUND"),
        (2, "SESSION_NOT_FOUND"),
    ]
    assert answer.errors[0].message.replace(LIVING, NOBODYS) == answer.errors[1].message
    assert to_array(answer.outputs)[0].tobytes() == accumulated(INPUTS).tobytes()
    assert (await alice.call["GetSession"](REQUESTS["GetSession"](LIVING))).session.next_step == 4


async def test_a_snapshot_is_imported_into_the_callers_own_sessions(parties: Any) -> None:
    _, alice, bob, _ = parties
    exported = await alice.call["ExportSession"](pb.ExportSessionRequest(session_id=LIVING))
    request = pb.ImportSessionRequest(snapshot=exported.snapshot, session_id=LIVING, request_id="request-1")

    imported = (await bob.call["ImportSession"](request)).session

    assert (imported.owner, imported.next_step) == ("bob", 4)
    assert await alice.ids() == await bob.ids() == [LIVING]


@pytest.mark.parametrize(
    "forged", ["+alice/of-alice1", "%2Balice/of-alice1", "alice/of-alice1", "../of-alice1"]
)
async def test_an_id_that_looks_like_somebodys_key_reaches_nothing(parties: Any, forged: str) -> None:
    _, _, bob, _ = parties

    for rpc in ("GetSession", "Step", "GetState", "DeleteSession", "ForkSession"):
        assert "INVALID_ARGUMENT" in await bob.try_out(rpc, forged)
    assert "INVALID_INPUT" in await bob.try_out("BatchStep", forged)
    request = pb.CreateSessionRequest(model_name="accumulator", session_id=forged)
    await refused(bob.call["CreateSession"](request), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")


async def test_a_call_without_a_good_token_is_refused_by_every_rpc(parties: Any) -> None:
    address = parties[1].address
    strangers = [Principal(address), Principal(address, "no-token-of-anybody")]

    for stranger in strangers:
        for rpc in REQUESTS:
            assert "UNAUTHENTICATED" in await stranger.try_out(rpc, LIVING), rpc
        await refused(stranger.create("mine"), UNKNOWN, "UNAUTHENTICATED")
        await refused(
            stranger.call["ImportSession"](pb.ImportSessionRequest(snapshot=b"")), UNKNOWN, "UNAUTHENTICATED"
        )
        await stranger.channel.close()


async def test_an_admin_lists_reads_and_deletes_the_sessions_of_others_and_no_more(parties: Any) -> None:
    _, alice, bob, root = parties
    await bob.create("of-bob")

    everybody = (await root.call["ListSessions"](pb.ListSessionsRequest(owner="-"))).sessions
    assert {(s.owner, s.session_id) for s in everybody} == {("alice", LIVING), ("bob", "of-bob")}
    assert sorted(await root.ids(owner="-")) == sorted([LIVING, "of-bob"])
    assert await root.ids(owner="bob") == ["of-bob"]
    assert await root.ids() == []
    get = pb.GetSessionRequest(session_id=LIVING, owner="alice")
    assert (await root.call["GetSession"](get)).session.next_step == 4
    state = pb.GetStateRequest(session_id=LIVING, owner="alice")
    assert len((await root.call["GetState"](state)).state) == 1
    export = pb.ExportSessionRequest(session_id=LIVING, owner="alice")
    assert (await root.call["ExportSession"](export)).snapshot
    assert "NOT_FOUND" in await root.try_out("Step", LIVING)
    await root.delete(LIVING, owner="alice")
    await refused(alice.call["GetSession"](REQUESTS["GetSession"](LIVING)), GONE, "SESSION_NOT_FOUND")


async def test_only_an_admin_may_name_an_owner(parties: Any) -> None:
    _, _, bob, _ = parties

    for owner in ("alice", "nobody", "-"):
        for rpc, fields in {
            "GetSession": {"session_id": LIVING},
            "GetState": {"session_id": LIVING},
            "ExportSession": {"session_id": LIVING},
            "DeleteSession": {"session_id": LIVING},
            "ListSessions": {},
        }.items():
            request = getattr(pb, f"{rpc}Request")(owner=owner, **fields)
            await refused(bob.call[rpc](request), DENIED, "PERMISSION_DENIED")


async def test_sessions_belong_to_the_same_principals_after_a_restart_and_a_crash(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    if settings["store"] == "none":
        pytest.skip("sessions end with the server")
    first, address = await serve(models, **settings)
    alice, bob = Principal(address, "a-token"), Principal(address, "b-token")
    for principal, num_steps in ((alice, 4), (bob, 2)):
        await principal.create("same-id", request_id="same-request")
        await principal.step("same-id", INPUTS[:num_steps])
    await crash(first)

    _, address = (
        await serve(models, **settings, lease_s=0.2)
        if "redis" in settings["store"]
        else await serve(models, **settings)
    )
    alice, bob = Principal(address, "a-token"), Principal(address, "b-token")

    for principal, num_steps in ((alice, 4), (bob, 2)):
        assert (await principal.create("same-id", request_id="same-request")).next_step == num_steps
        outputs = await principal.step("same-id")
        whole = accumulated(np.concatenate([INPUTS[:num_steps], INPUTS]))
        assert outputs.tobytes() == whole[num_steps:].tobytes()


async def test_sessions_made_before_callers_were_told_apart_belong_to_whom_the_setting_names(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    if settings["store"] == "none":
        pytest.skip("sessions end with the server")
    open_settings = {"store": settings["store"], "sync": "normal"}
    server, address = await serve(models, **open_settings)
    anybody = Principal(address)
    await anybody.create("old")
    await anybody.step("old")
    await server.stop()

    server, address = await serve(models, **settings, unowned_sessions_owner="alice")
    alice, bob = Principal(address, "a-token"), Principal(address, "b-token")

    assert await alice.ids() == ["old"]
    assert await bob.ids() == []
    assert "NOT_FOUND" in await bob.try_out("Step", "old")
    await bob.create("of-bob")
    assert await alice.ids() == ["old"]
    assert (await alice.call["GetSession"](REQUESTS["GetSession"]("old"))).session.owner == "alice"
    await alice.step("old")
    # And they are not reached through it by an id that looks like a key.
    assert "INVALID_ARGUMENT" in await alice.try_out("Step", "+bob/of-bob")


async def test_a_principal_with_sessions_of_its_own_cannot_become_the_owner_of_the_others(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    if settings["store"] == "none":
        pytest.skip("sessions end with the server")
    server, address = await serve(models, **settings)
    await Principal(address, "a-token").create("mine")
    await server.stop()

    with pytest.raises(Exception, match="already"):
        await serve(models, **settings, unowned_sessions_owner="alice")


async def test_what_principals_do_to_sessions_is_in_the_log_without_their_tokens(parties: Any) -> None:
    _, alice, _, root = parties

    with capture_logs() as logs:
        await alice.create("new")
        await alice.call["ForkSession"](pb.ForkSessionRequest(source_session_id="new", session_id="fork"))
        snapshot = (await alice.call["ExportSession"](pb.ExportSessionRequest(session_id="new"))).snapshot
        await alice.call["ImportSession"](pb.ImportSessionRequest(snapshot=snapshot, session_id="copy"))
        await root.delete("new", owner="alice")

    told = [
        (line["event"], line["principal"], line["owner"], line["session_id"])
        for line in logs
        if line.get("audit")
    ]
    assert told == [
        ("session created", "alice", "alice", "new"),
        ("session forked", "alice", "alice", "fork"),
        ("session exported", "alice", "alice", "new"),
        ("session imported", "alice", "alice", "copy"),
        ("session deleted", "root", "alice", "new"),
    ]
    assert "token" not in repr(logs)


async def test_a_stream_ends_when_what_it_began_with_expires(
    parties: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, alice, *_ = parties
    authenticate = server._authenticator.authenticate

    async def expiring(*args: Any) -> Any:
        from dataclasses import replace
        from time import time

        return replace(await authenticate(*args), expires_s=time() + 0.2)

    monkeypatch.setattr(server._authenticator, "authenticate", expiring)
    wait = asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        yield pb.StreamStepsRequest(step=REQUESTS["Step"](LIVING))
        await wait.wait()

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in alice.call["StreamSteps"](requests()):
            pass
    assert ended.value.code() == UNKNOWN
    wait.set()
