"""A part of `make attack`, for what holds on any machine: nobody gets wrong bits, and the server stays sound."""

from __future__ import annotations

from pathlib import Path

from tests.attack import overload, trial

SOME = ("SETTINGS frames", "calls reset at once", "shapes of a million axes", "model files that are none")


def test_neighbours_of_an_attack_get_their_own_bits_and_the_server_stays_sound(tmp_path: Path) -> None:
    server = trial.Server(tmp_path / "server")
    try:
        with trial.neighbours_of(server.address, "") as neighbours:
            rows = [trial.try_out(name, server, neighbours, seconds=1.0) for name in SOME]
    finally:
        server.stop()

    for row in rows:
        assert row.is_sound, row
        assert row.before.num_wrong == row.during.num_wrong == row.after.num_wrong == 0, row
        assert row.after.num_good, row


def test_what_is_too_much_is_refused_and_the_rest_is_answered(tmp_path: Path) -> None:
    server = trial.Server(tmp_path / "server", *overload.FLAGS, only_slow=True)
    try:
        payloads = overload.sessions_of(server.address)
        peak = overload.peak_of(server.address, payloads, seconds=1.0)
        load = overload.offer(server.address, payloads, 10 * peak, seconds=2.0)
    finally:
        server.stop()

    assert load.refused_per_s > load.good_per_s > 0
