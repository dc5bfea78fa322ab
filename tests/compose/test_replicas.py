"""The `scale` profile: replicas killed, rolled, multiplied and cut off from their store, under load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compose.compose import Compose, crash_server, docker, health, wait_until
from tests.compose.load import NUM_SESSIONS, Account, load

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]

CALM_S = 2.0


@pytest.fixture(scope="module")
def scaled(start_project: Callable[..., Compose]) -> Compose:
    """Two replicas, Valkey and the router, healthy."""
    project = start_project("scale")
    project.run("--profile", "scale", "up", "--detach", "--wait", "router")
    return project


def owners(project: Compose, session_ids: list[str]) -> dict[str, str]:
    """Which replica has each session, as the store has it."""
    asked = "\n".join(f"HGET ntm:session:+operator/{session_id} owner" for session_id in session_ids)
    client = (
        "REDISCLI_AUTH=$(cat /run/secrets/valkey_password) valkey-cli --tls --cacert /run/tls/authority.pem"
    )
    script = f"{client} <<'END'\n{asked}\nEND"
    (valkey,) = project.containers("valkey")
    return dict(zip(session_ids, docker("exec", valkey, "sh", "-c", script).split("\n"), strict=False))


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {session_id for session_id, owner in before.items() if after[session_id] != owner}


async def test_a_killed_replica_costs_its_sessions_time_and_nothing_else(
    scaled: Compose, report: Callable[[str, Account, str], None]
) -> None:
    async with load(scaled.router_address, scaled.credentials) as running:
        await asyncio.sleep(CALM_S)
        before = await asyncio.to_thread(owners, scaled, running.session_ids)
        victim = scaled.containers("replica")[0]
        await asyncio.to_thread(crash_server, victim)
        await asyncio.sleep(CALM_S)
        await asyncio.to_thread(wait_until, lambda: health(victim) == "healthy", "the replica restarts")
        await asyncio.sleep(3 * CALM_S)
        after = await asyncio.to_thread(owners, scaled, running.session_ids)
        account = await running.end()

    # Its restart is a new replica to the store, so every session of the dead one counts as moved.
    survivors = {owner for owner in before.values() if owner in after.values()}
    stayed = [session_id for session_id, owner in before.items() if owner in survivors]
    strayed = moved({session_id: before[session_id] for session_id in stayed}, after)
    report(
        "a replica killed, and restarted by its policy",
        account,
        f"{len(moved(before, after))} of {NUM_SESSIONS}",
    )
    assert account.is_clean, account
    assert not strayed


async def test_all_replicas_are_replaced_one_by_one_and_no_call_fails(
    scaled: Compose, report: Callable[[str, Account, str], None]
) -> None:
    old = set(scaled.containers("replica"))
    async with load(scaled.router_address, scaled.credentials) as running:
        await asyncio.sleep(CALM_S)
        await asyncio.to_thread(scaled.shell, "make", "roll")
        await asyncio.sleep(CALM_S)
        account = await running.end()

    report("both replicas replaced, `make roll`", account, "all, once or twice")
    assert account.is_clean, account
    assert len(scaled.containers("replica")) == 2
    assert not old & set(scaled.containers("replica"))


async def test_a_valkey_that_restarts_is_waited_for(
    scaled: Compose, report: Callable[[str, Account, str], None]
) -> None:
    async with load(scaled.router_address, scaled.credentials) as running:
        await asyncio.sleep(CALM_S)
        before = await asyncio.to_thread(owners, scaled, running.session_ids)
        await asyncio.to_thread(scaled.run, "restart", "valkey")
        await asyncio.sleep(2 * CALM_S)
        after = await asyncio.to_thread(owners, scaled, running.session_ids)
        account = await running.end()

    report("Valkey restarted", account, f"{len(moved(before, after))} of {NUM_SESSIONS}")
    assert account.is_clean, account


async def test_two_replicas_become_four_and_two_again(
    scaled: Compose, report: Callable[[str, Account, str], None]
) -> None:
    def scale(count: int) -> None:
        scaled.run(
            *("--profile", "scale", "up", "--detach", "--wait", "--no-deps", "--no-recreate"),
            *("--scale", f"replica={count}", "replica"),
        )

    async with load(scaled.router_address, scaled.credentials) as running:
        await asyncio.sleep(CALM_S)
        two = await asyncio.to_thread(owners, scaled, running.session_ids)
        await asyncio.to_thread(scale, 4)
        await asyncio.sleep(2 * CALM_S)
        four = await asyncio.to_thread(owners, scaled, running.session_ids)
        await asyncio.to_thread(scale, 2)
        await asyncio.sleep(2 * CALM_S)
        again = await asyncio.to_thread(owners, scaled, running.session_ids)
        account = await running.end()

    up, down = len(moved(two, four)), len(moved(four, again))
    report("2 replicas, then 4, then 2", account, f"{up}, then {down} of {NUM_SESSIONS}")
    assert account.is_clean, account
    assert len(set(four.values())) > 2
    # A consistent hash moves half of them each time, on average; a hash that is not moves three in four.
    assert up <= 0.8 * NUM_SESSIONS
    assert down <= 0.8 * NUM_SESSIONS


def test_the_password_is_in_no_environment_and_no_argument(scaled: Compose, secrets: Path) -> None:
    password = (secrets / "valkey_password").read_text()
    for service in ("replica", "valkey"):
        container = scaled.containers(service)[0]
        assert password not in docker("inspect", container)
        read = "tr '\\0' ' ' < /proc/1/cmdline; tr '\\0' ' ' < /proc/1/environ"
        assert password not in docker("exec", container, "sh", "-c", read)
    refused = docker("exec", scaled.containers("valkey")[0], "valkey-cli", "get", "ntm:schema", check=False)
    assert "NOAUTH" in refused or "reset by peer" in refused  # it speaks TLS alone
