from server.wait_limit import WaitLimit


def test_a_limit_is_reached_where_waits_stay_long():
    limit = WaitLimit(1.0)

    for now_s in (10.0, 10.2, 10.5):
        limit.note(now_s - 0.6, now_s)
        assert limit.is_near
        assert not limit.is_reached
    limit.note(10.0, 10.6)

    assert limit.is_reached


def test_a_pause_after_which_all_have_waited_is_no_overload():
    limit = WaitLimit(1.0)

    limit.note(10.0, 15.0)
    assert not limit.is_reached
    limit.note(14.9, 15.1)

    assert not limit.is_near


def test_a_limit_is_left_as_soon_as_waits_are_short_or_nobody_waits():
    limit = WaitLimit(1.0)
    for now_s in (10.0, 10.6):
        limit.note(now_s - 0.9, now_s)
    assert limit.is_reached

    limit.note(11.0, 11.1)
    assert not limit.is_reached
    for now_s in (12.0, 12.6):
        limit.note(now_s - 0.9, now_s)
    limit.clear()

    assert not limit.is_reached


def test_without_a_limit_any_wait_will_do():
    limit = WaitLimit()

    limit.note(0.0, 1e9)

    assert not limit.is_near


def test_two_pauses_with_nobody_waiting_between_them_are_no_overload():
    limit = WaitLimit(1.0)

    limit.note(10.0, 11.0)
    limit.note(600.0, 601.0)

    assert not limit.is_reached
