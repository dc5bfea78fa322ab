"""Service load: the highest rate of the load that services have that a server bears, ours beside Triton.

Callers come at random, make 50 single steps at an even pace, and go (`sequence_load.py`); a rate is borne when 99 of
100 messages are answered within 100 ms. The highest is found by halving steps, the servers taking turns trial by trial.
Then Triton's own Python client puts sequences of 50 steps on both servers, as fast as they go and at equal rates.

    python -m benchmarks --only service_load
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import psutil

from benchmarks.load import Kind, LoadError, in_own_process, quantile
from benchmarks.measuring import Case, Figure, Figures, Metrics, side_by_side
from benchmarks.peers import triton
from benchmarks.scripts import inference_script, own_script
from benchmarks.sequence_load import Script, TrialReport, trial
from benchmarks.serving import on_store

STORES = ("none", "SQLite, sync normal", "Valkey, everysec")
KINDS: tuple[Kind, ...] = ("unary", "stream")
EQUAL_RATE_PER_S = 3000.0
"""Steps/s at which all servers are compared."""
FIRST_RATE_PER_S = 6000.0
"""Steps/s at which each search begins; it goes on by eighths of an octave, 9 %."""
CLIENT_RATES_PER_S = (1000, 2000)
"""Steps/s at which Triton's client compares latency."""

_MOST_SEQUENCES = 8192
_NUM_CLIENTS = 2
_CLIENT = triton.ROOT / "benchmarks" / "peers" / "triton_client.py"


def compare(most_turns: int = 12, trial_s: float = 1.0, num_rounds: int = 3) -> Figures:
    """See that both servers give the same bits to the same programs, and measure them.

    Args:
        most_turns: trials of each server at most; 8 are enough when no other work disturbs them.
        trial_s: time in which a trial's messages are due, and those of Triton's client answered.
        num_rounds: at equal rates, and of Triton's client; of our generator one less.

    Raises:
        TritonUnavailableError: there is no Triton.
        LoadError: a message failed, a server bore no rate, or the two do not do the same.
    """
    with ExitStack() as stack:
        flags = ("--max-resident-sessions", str(_MOST_SEQUENCES))
        servers = {store: _Server(*stack.enter_context(on_store(store, *flags))) for store in STORES}
        servers["Triton"] = _Server(*stack.enter_context(triton.serving(_MOST_SEQUENCES)))
        _check_that_both_do_the_same(servers["none"].address, servers["Triton"].address)
        loads: dict[str, _SequenceLoad] = {}
        for kind in KINDS:
            for store in STORES:
                loads[name(kind, store)] = _SequenceLoad(servers[store], own_script(kind), trial_s)
            for server in ("none", "Triton"):
                load = _SequenceLoad(servers[server], inference_script(kind), trial_s)
                loads[name(kind, server, by_inference=True)] = load
        at_equal_rate: dict[str, Case] = {
            f"{case}, {EQUAL_RATE_PER_S:g} steps/s offered": load.measure for case, load in loads.items()
        }
        figures = side_by_side(at_equal_rate, num_rounds - 1)
        searches = {case: _Search(load) for case, load in loads.items()}
        for _ in range(most_turns):
            for search in searches.values():
                if not search.is_over:
                    search.go_on()
        figures |= {case: search.found(case) for case, search in searches.items()}
        by_client: dict[str, Case] = {}
        for rate in (None, *CLIENT_RATES_PER_S):
            for server in ("none", "Triton"):
                by_client[client_name(server, rate)] = _ClientLoad(servers[server], rate, trial_s).measure
        return figures | side_by_side(by_client, num_rounds)


def name(kind: Kind, server: str, by_inference: bool = False) -> str:
    """The name of a search."""
    protocol = ", inference protocol" if by_inference else ""
    return f"{server}: sequences of 50 steps, {kind}{protocol}"


def client_name(server: str, steps_per_s: float | None = None) -> str:
    """The name of a load by Triton's client."""
    rate = f", {steps_per_s:g} steps/s offered" if steps_per_s else ""
    return f"{server}: sequences of 50 steps, tritonclient's streams{rate}"


def _check_that_both_do_the_same(ours: str, theirs: str) -> None:
    for program in triton.PROGRAMS:
        if triton.run(program, ours) != triton.run(program, theirs):
            raise LoadError(f"{program.name} gives other outputs on this server than on Triton")


class _Server:
    """A running server, and what names sequences that it has never seen."""

    def __init__(self, address: str, pids: list[int]) -> None:
        self.address = address
        self.next_number = 2**28  # which takes as many bytes as every number after it
        self._processes = [psutil.Process(pid) for pid in pids]

    def cpu_s(self) -> float:
        """Processor time of its processes."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


class _SequenceLoad:
    """Sequences of a script on a server."""

    def __init__(self, server: _Server, script: Script, trial_s: float) -> None:
        self._server, self._script, self._trial_s = server, script, trial_s
        self._seeds = count()

    def measure(self) -> Metrics:
        """Offer the rate at which all are compared."""
        return self.offer(EQUAL_RATE_PER_S)[1]

    def offer(self, steps_per_s: float) -> tuple[TrialReport, Metrics]:
        """Offer a rate once."""
        start_cpu_s = self._server.cpu_s()
        report = in_own_process(
            trial,
            self._server.address,
            self._script,
            steps_per_s=steps_per_s,
            duration_s=self._trial_s,
            first_number=self._server.next_number,
            seed=next(self._seeds),
        )
        self._server.next_number += report.num_sequences
        cpu_us = (self._server.cpu_s() - start_cpu_s) / report.num_sent * 1e6
        return report, {
            "steps_per_s": steps_per_s,
            "share_in_time": report.share_in_time,
            "p50_ms": report.p50_ms,
            "p99_ms": report.p99_ms,
            "cpu_us_per_message": cpu_us,
            "cpu_us_per_step": cpu_us * len(self._script.messages) / self._script.num_steps,
            "generator_cpu_share": report.generator_cpu_share,
        }


class _Search:
    """The search for the highest rate that a server bears: up when one is borne, down when it is lost.

    Rates are counted in eighths of an octave from the first. A step is an octave at first, half of the last one where
    the search turns round, and twice the last one when it has gone the same way twice more: so it comes back from what
    a machine's other guests made of a trial, which plain bisection would not.
    """

    def __init__(self, load: _SequenceLoad) -> None:
        self._load = load
        self._rate, self._step = 0, 8
        self._last_held: bool | None = None
        self._num_same = 0
        self._borne: dict[int, Metrics] = {}
        self._lost: list[int] = []

    @property
    def is_over(self) -> bool:
        """The rate above the highest that was borne was lost twice."""
        return bool(self._borne) and self._lost.count(max(self._borne) + 1) >= 2

    def go_on(self) -> None:
        """Try one rate more."""
        report, metrics = self._load.offer(FIRST_RATE_PER_S * 2 ** (self._rate / 8))
        if report.is_held:
            self._borne[self._rate] = metrics
        else:
            self._lost.append(self._rate)
        if self._last_held is not None:
            self._num_same = self._num_same + 1 if report.is_held == self._last_held else 0
            if self._num_same == 0:
                self._step = max(1, self._step // 2)
            elif self._num_same >= 2:
                self._step = min(8, 2 * self._step)
        self._last_held = report.is_held
        self._rate += self._step if report.is_held else -self._step

    def found(self, case: str) -> dict[str, Figure]:
        """What was measured at the highest rate that was borne; the highest of `steps_per_s` was not.

        Raises:
            LoadError: no rate was borne.
        """
        if not self._borne:
            raise LoadError(
                f"{case}: {FIRST_RATE_PER_S * 2 ** (min(self._lost) / 8):g} steps/s were too many"
            )
        highest = max(self._borne)
        above = min((rate for rate in self._lost if rate > highest), default=highest)
        figures = {metric: Figure(value, value, value) for metric, value in self._borne[highest].items()}
        rate = figures["steps_per_s"].median
        return figures | {"steps_per_s": Figure(rate, rate, rate * 2 ** ((above - highest) / 8))}


class _ClientLoad:
    """Triton's own client as a load, in processes of its own."""

    def __init__(self, server: _Server, steps_per_s: float | None, duration_s: float) -> None:
        """As fast as the server answers when there is no rate: 64 sequences over 8 streams."""
        self._server, self._steps_per_s, self._duration_s = server, steps_per_s, duration_s
        self._seeds = count()

    def measure(self) -> Metrics:
        """Run the load once."""
        with ExitStack() as stack:
            clients = [stack.enter_context(self._client()) for _ in range(_NUM_CLIENTS)]
            for client in clients:
                assert client.stdout is not None
                if client.stdout.readline() != "ready\n":
                    raise LoadError("Triton's client ended before it began; it has told why")
            start_cpu_s = self._server.cpu_s()
            answers = [*self._reports(clients)]
            cpu_us = (
                (self._server.cpu_s() - start_cpu_s) / sum(answer["num_sent"] for answer in answers) * 1e6
            )
        latencies_s = sorted(latency_s for answer in answers for latency_s in answer["latencies_s"])
        return {
            "steps_per_s": sum(answer["answered_per_s"] for answer in answers),
            "p50_ms": 1e3 * quantile(latencies_s, 0.5),
            "p99_ms": 1e3 * quantile(latencies_s, 0.99),
            "cpu_us_per_step": cpu_us,
            "generator_cpu_share": sum(answer["cpu_share"] for answer in answers),
        }

    def _client(self) -> subprocess.Popen[str]:
        first_id = self._server.next_number
        self._server.next_number += 1_000_000
        options = {
            "address": self._server.address,
            "first_id": first_id,
            "num_streams": 4,
            "sequences_per_stream": 8,
            "steps_per_s": self._steps_per_s and self._steps_per_s / _NUM_CLIENTS,
            "duration_s": self._duration_s,
            "seed": next(self._seeds),
        }
        return subprocess.Popen(  # noqa: S603  # nosec B603  # a command of our own
            [str(triton.ENVIRONMENT / "bin" / "python"), str(_CLIENT), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _reports(self, clients: list[subprocess.Popen[str]]) -> Iterator[dict[str, Any]]:
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        for client in clients:
            assert client.stdout is not None
            line = client.stdout.readline()
            if not line:
                raise LoadError("Triton's client failed; it has told why")
            yield json.loads(line)
