"""Batches: a BatchStep until each of its sessions has an answer.

It does no I/O: `_async/client.py` sends the groups that are chosen here, and brings the answers.

Shapes: T steps of one message, S sessions of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from ntm._errors import ClientError, UnavailableError, from_status
from ntm._progress import SessionProgress
from ntm._requests import metadata
from ntm._results import BatchResult
from ntm._steps import Inputs, fill_inputs, outputs_of, shown
from ntm.tensor import Array
from ntm.v1 import session_service_pb2


class Batch:
    """A BatchStep until each of its sessions has an answer: what is sent, in which groups, and what came back."""

    def __init__(self, sessions: Sequence[SessionProgress], inputs: Array) -> None:
        """Inputs [S, T, ...input shape]."""
        self.groups = [list(range(len(sessions)))]
        """Indices of the sessions that are still to be sent, one list for each call."""
        self.has_answers = False
        self._sessions = sessions
        self._inputs = inputs
        self._outputs = sessions[0].model.no_outputs(*inputs.shape[:2])
        self._errors: dict[int, ClientError] = {}
        self._were_misplaced: set[int] = set()

    def request(self, group: Sequence[int]) -> session_service_pb2.BatchStepRequest:
        """Numbered messages for the sessions of a group."""
        request = session_service_pb2.BatchStepRequest(
            session_ids=[self._sessions[index].session_id for index in group],
            first_steps=[self._sessions[index].next_step for index in group],
        )
        fill_inputs(request, self._inputs[group])
        return request

    def metadata(self, group: Sequence[int]) -> tuple[tuple[str, str], ...]:
        """Sends a group to the replica of its first session."""
        return metadata(self._sessions[group[0]].session_id)

    def answered(self, group: Sequence[int], response: session_service_pb2.BatchStepResponse) -> None:
        """Keep the results of a group, and move its sessions that ran to their next step."""
        self.has_answers = True
        errors = {
            error.index: from_status(error.code, error.reason, error.message, dict(error.metadata))
            for error in response.errors
        }
        approximate = set(response.approximate)
        outputs = outputs_of(response, 2) if response.HasField("outputs") or response.named_outputs else None
        for position, index in enumerate(group):
            if position in errors:
                self._errors[index] = errors[position]
                continue
            assert outputs is not None
            self._errors.pop(index, None)
            self._outputs[index] = outputs[position]
            self._sessions[index].next_step = response.next_steps[position]
            self._sessions[index].approximate = position in approximate

    def failed(self, group: Sequence[int], error: ClientError) -> None:
        """Keep the error of a group's call, unless there are no results that it would take away.

        Raises:
            ClientError: this error, when no group was answered yet.
        """
        if not self.has_answers:
            raise error
        self._errors.update(dict.fromkeys(group, error))

    def regroup(self) -> None:
        """Choose the groups to send again: by the replica that has them, and alone when that did not help.

        Raises:
            UnavailableError: there are some.
        """
        groups: dict[tuple[str, int | str], list[int]] = {}
        for number, group in enumerate(self.groups):
            for index in group:
                error = self._errors.get(index)
                if not isinstance(error, UnavailableError):
                    continue
                key: tuple[str, int | str] = ("as before", number)
                if error.reason == "WRONG_REPLICA":
                    is_second_time = index in self._were_misplaced
                    key = ("alone", index) if is_second_time else ("on", error.metadata.get("replica", ""))
                    self._were_misplaced.add(index)
                groups.setdefault(key, []).append(index)
        self.groups = list(groups.values())
        if self.groups:
            raise self._errors[self.groups[0][0]]

    def result(self) -> BatchResult:
        """What all the calls together came to."""
        return BatchResult(shown(self._outputs), dict(sorted(self._errors.items())))


def batch_inputs(
    sessions: Sequence[SessionProgress], inputs: Inputs, resets: npt.ArrayLike | None = None
) -> Array:
    """The inputs of a batch as one array of steps, [S, T].

    Raises:
        ValueError: there is no session, or as many rows as sessions are missing, or as `Model.inputs`.
    """
    if not sessions:
        raise ValueError("send at least one session")
    array = sessions[0].model.inputs(inputs, num_leading_axes=2, resets=resets)
    if len(array) != len(sessions):
        raise ValueError(f"inputs have {len(array)} rows for {len(sessions)} sessions: send one for each")
    return array
