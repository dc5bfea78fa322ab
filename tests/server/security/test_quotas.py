import pytest

from server.errors import QuotaExceededError
from server.security.quotas import MIB, QuotaEnforcer, Quotas, Usage


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def run(enforcer, principal, num_steps):
    """Begin a message and end it at once; says after how long to try again if it is refused."""
    try:
        enforcer.begin_steps(principal, num_steps)
    except QuotaExceededError as error:
        return error.retry_after_s
    enforcer.end_steps(principal, num_steps)
    return None


def test_steps_pass_at_the_rate_whatever_their_messages_are_like(clock):
    for num_steps in (1, 7, 300):
        enforcer = QuotaEnforcer(Quotas(max_steps_per_s=100.0), clock)
        num_run, begun_s = 0, clock.now_s
        while clock.now_s < begun_s + 50.0:
            if run(enforcer, "alice", num_steps) is None:
                num_run += num_steps
            clock.now_s += 0.01
        # A second's worth of what was saved up, and one message that is owed.
        assert 5000 - num_steps <= num_run <= 5100 + num_steps


def test_who_is_refused_is_told_when_to_come_again(clock):
    enforcer = QuotaEnforcer(Quotas(max_steps_per_s=10.0), clock)
    assert run(enforcer, "alice", 30) is None

    retry_after_s = run(enforcer, "alice", 1)

    assert retry_after_s is not None
    assert retry_after_s > 1.9
    clock.now_s += retry_after_s - 0.01
    assert run(enforcer, "alice", 1) is not None
    clock.now_s += 0.02
    assert run(enforcer, "alice", 1) is None


def test_one_principals_quota_is_not_anothers(clock):
    enforcer = QuotaEnforcer(Quotas(max_steps_per_s=1.0, max_queued_steps=5), clock)
    assert run(enforcer, "alice", 5) is None

    assert run(enforcer, "alice", 1) is not None
    assert run(enforcer, "bob", 1) is None


def test_steps_wait_up_to_the_quota_and_a_refused_message_takes_nothing_of_it():
    enforcer = QuotaEnforcer(Quotas(max_queued_steps=10))
    enforcer.begin_steps("alice", 6)
    for _ in range(3):
        with pytest.raises(QuotaExceededError):
            enforcer.begin_steps("alice", 5)
    enforcer.begin_steps("alice", 4)

    enforcer.end_steps("alice", 6)

    enforcer.begin_steps("alice", 6)


async def test_a_session_over_the_quota_does_not_begin():
    enforcer = QuotaEnforcer(Quotas(max_sessions=2))
    used = 1

    async def usage():
        return Usage(used, 0)

    async with enforcer.beginning("alice", 0, usage):
        with pytest.raises(QuotaExceededError):
            async with enforcer.beginning("alice", 0, usage):
                pass
    async with enforcer.beginning("alice", 0, usage):
        used = 2
    with pytest.raises(QuotaExceededError):
        async with enforcer.beginning("alice", 0, usage):
            pass
    used = 0
    async with enforcer.beginning("alice", 0, usage):
        pass


async def test_what_sessions_may_take_in_the_store_is_bounded():
    enforcer = QuotaEnforcer(Quotas(max_stored_mib=3))

    async def usage():
        return Usage(2, 2 * MIB)

    async with enforcer.beginning("alice", MIB, usage):
        pass
    with pytest.raises(QuotaExceededError, match="MiB"):
        async with enforcer.beginning("alice", MIB + 1, usage):
            pass


async def test_a_beginning_that_fails_gives_its_place_back():
    enforcer = QuotaEnforcer(Quotas(max_sessions=1))

    async def usage():
        return Usage(0, 0)

    for _ in range(3):
        with pytest.raises(LookupError):
            async with enforcer.beginning("alice", 0, usage):
                raise LookupError
    async with enforcer.beginning("alice", 0, usage):
        pass


def test_principals_who_come_and_go_leave_nothing_for_ever(monkeypatch):
    monkeypatch.setattr("server.security.quotas._MAX_ACCOUNTS", 100)
    enforcer = QuotaEnforcer(Quotas(max_queued_steps=5))
    enforcer.begin_steps("waiting", 5)
    for number in range(1000):
        run(enforcer, str(number), 1)

    assert len(enforcer._accounts) <= 101
    assert run(enforcer, "waiting", 1) is not None


def test_more_than_its_share_has_who_has_more_waiting_than_others_on_average(clock):
    enforcer = QuotaEnforcer(Quotas(), clock)
    enforcer.begin_steps("alice", 9)
    assert not enforcer.has_more_than_its_share("alice")  # nobody else wants any

    enforcer.begin_steps("bob", 1)

    assert enforcer.has_more_than_its_share("alice")
    assert not enforcer.has_more_than_its_share("bob")
    assert not enforcer.has_more_than_its_share("carol")
    enforcer.end_steps("alice", 8)
    assert not enforcer.has_more_than_its_share("alice")
    enforcer.end_steps("bob", 1)
    enforcer.end_steps("alice", 1)
    assert not enforcer.has_more_than_its_share("alice")
