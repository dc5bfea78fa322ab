"""Everything that can go wrong, as types; free of gRPC, which `status.py` adds.

ServingError
├── StartupError                      the server does not start
│   ├── ModelRepositoryError          no models directory, an empty one, or files that cannot be served
│   ├── ModelFileError                one file: corrupt, without a spec, or its spec and graph disagree
│   ├── DeviceError                   the device asked for cannot be had
│   ├── ListenError                   the address cannot be listened on
│   ├── TransportError                the transport asked for cannot serve what is asked
│   ├── StoreSettingsError            the store cannot be used as asked
│   ├── TracingError                  spans were asked for, and cannot be made
│   └── SecurityFileError             a certificate, a key or a file of tokens cannot be used
├── InvalidInputError                 a field of a request is wrong
├── ModelNotFoundError
├── ModelLeavingError                 this version takes no new sessions
├── SessionNotFoundError
│   └── SessionExpiredError
├── SessionExistsError
├── SessionIdRetiredError
├── RequestIdReusedError
├── StepOrderError                    a step number that does not fit the session's counter
│   ├── StepGapError
│   ├── StepTooOldError
│   ├── InputMismatchError
│   └── StateNotKeptError
├── ModelMismatchError                a session's state comes from another model file
├── ModelNotLoadedError               a session's model is not in service
├── RecoveryError                     a session cannot be brought back as it was
│   ├── SessionCorruptError
│   ├── SessionQuarantinedError
│   └── RecoveryNotExactError
├── SessionMovedError                 another replica has, or wants, the session
│   └── WrongReplicaError
├── NoFreeSlotError
├── QueueFullError
│   ├── QueueTooSlowError
│   └── ServerOverloadedError
├── StepFailedError                   the model failed on a message's inputs
│   └── OutputNotFiniteError
├── StepTimedOutError                 a step took longer than one may
├── EngineFailedError                 a batch failed, whatever the inputs
├── StoreError                        the store did not do what it was asked; nothing was answered as done
│   ├── StoreUnavailableError
│   ├── StoreFullError
│   └── StoreCorruptError
├── LeaseLapsedError                  this replica's lease has run out
├── UnauthenticatedError              the caller is nobody who is known here
├── PermissionDeniedError             the caller may not do this
├── QuotaExceededError                the caller has taken what one principal may
└── ServerStoppingError
"""

from __future__ import annotations

from collections.abc import Sequence


def shown_id(key: str) -> str:
    """The id that a caller knows a session or a request by: inside, its owner stands before it."""
    return key.rpartition("/")[2]


class ServingError(Exception):
    """Something a caller or an operator is told about: what happened and what to do next."""

    retry_after_s: float | None = None
    """After how many seconds the same call may be tried again, where that is known."""

    @property
    def details(self) -> dict[str, str]:
        """Facts for programs, sent beside the message."""
        return {}


class StartupError(ServingError):
    """The server does not start."""


class ModelRepositoryError(StartupError):
    """The models directory is missing or empty, or holds files that cannot be served."""


class ModelFileError(StartupError):
    """One model file cannot be served; every reason is listed."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        super().__init__(f"{path} cannot be served:" + "".join(f"\n  - {problem}" for problem in problems))
        self.problems = tuple(problems)


class DeviceError(StartupError):
    """The device asked for cannot be had."""


class ListenError(StartupError):
    """The address cannot be listened on."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"cannot listen on {address}: another program has the port, or the address is not this machine's; "
            "choose another with --listen HOST:PORT (port 0 takes a free one)"
        )


class TransportError(StartupError):
    """The transport asked for cannot serve what is asked."""


class TracingError(StartupError):
    """Spans were asked for, and OpenTelemetry is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "spans are to be sent to otlp_endpoint, and OpenTelemetry is not installed: install the extra otel "
            "(pip install -c constraints.txt '.[otel]'), or take the setting or OTEL_EXPORTER_OTLP_ENDPOINT away"
        )


class InvalidInputError(ServingError):
    """A field of a request is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field

    @property
    def details(self) -> dict[str, str]:
        """The field at fault."""
        return {"field": self.field}


class ModelNotFoundError(ServingError):
    """No model has this name, or this version of it is not served."""

    def __init__(self, name: str, version: int | None, served: Sequence[str]) -> None:
        wanted = name if version is None else f"{name}/{version}"
        super().__init__(f"no model {wanted!r} is served here: there is {', '.join(served) or 'none'}")


class ModelLeavingError(ServingError):
    """The version was removed from the models directory: it serves the sessions it has, and takes no new ones."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"model {model!r} takes no new sessions, since it was removed from the models directory: "
            "take another version, or put it back",
        )


class SessionNotFoundError(ServingError):
    """No session has this id: it was never created, or it was deleted (an expired one has its own type)."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"no session {shown_id(session_id)!r}: create one and replay its inputs")
        self.session_id = session_id


class SessionExpiredError(SessionNotFoundError):
    """The session ended by its idle limit."""


class SessionExistsError(ServingError):
    """The id of a new session is taken."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"session {shown_id(session_id)!r} exists already: choose another id, or repeat its creation with the "
            "request_id that made it"
        )


class SessionIdRetiredError(ServingError):
    """The id of a new session belonged to one that ended a short while ago."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"session id {shown_id(session_id)!r} belonged to a session that has ended, and is kept free for 24 "
            "hours so that no late message reaches another session: choose a new id"
        )


class RequestIdReusedError(ServingError):
    """A request id came again with another request."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request id {shown_id(request_id)!r} came before with another request: use a new one for each"
        )


class StepOrderError(ServingError):
    """A step number does not fit the session's counter."""

    def __init__(self, message: str, next_step: int) -> None:
        super().__init__(message)
        self.next_step = next_step

    @property
    def details(self) -> dict[str, str]:
        """The session's counter."""
        return {"next_step": str(self.next_step)}


class StepGapError(StepOrderError):
    """The message starts beyond the session's counter: steps before it are missing."""

    def __init__(self, step: int, next_step: int) -> None:
        super().__init__(
            f"step {step} leaves a gap: the session's next step is {next_step}; send the steps between first",
            next_step,
        )


class StepTooOldError(StepOrderError):
    """The message repeats steps whose answers are no longer recorded."""

    def __init__(self, step: int, oldest: int, next_step: int) -> None:
        super().__init__(
            f"step {step} is too old to repeat: the answers kept begin at step {oldest}, and the session's next step "
            f"is {next_step}; go on from there",
            next_step,
        )


class InputMismatchError(StepOrderError):
    """The message repeats a step with other inputs than it ran with."""

    def __init__(self, step: int, next_step: int) -> None:
        super().__init__(
            f"step {step} has run with other inputs: a repeat must send the same bytes; the session's next step is "
            f"{next_step}",
            next_step,
        )


class StateNotKeptError(StepOrderError):
    """State was asked for as it was after a repeated message, and the session has moved on since."""

    def __init__(self, step: int, next_step: int) -> None:
        super().__init__(
            f"the state after step {step} is no longer kept: the session has moved on to step {next_step}; repeat "
            "without include_state for the outputs, or call GetState for the state as it is now",
            next_step,
        )


class NoFreeSlotError(ServingError):
    """Every slot of the model holds a session, and there is no store to put one away."""

    def __init__(self, model: str, max_sessions: int) -> None:
        super().__init__(
            f"all {max_sessions} slots of model {model!r} hold a session: delete one, try again later, raise "
            "--max-resident-sessions, or keep sessions in a store"
        )


class QueueFullError(ServingError):
    """Too many messages wait for the model."""

    retry_after_s = 0.1

    def __init__(self, model: str, max_pending: int) -> None:
        super().__init__(
            f"{max_pending} messages wait for model {model!r}, as many as may: try again after a pause, or raise "
            "--max-pending-messages"
        )


class QueueTooSlowError(QueueFullError):
    """Messages wait for the model longer than they may: it is asked for more than it can do."""

    def __init__(self, model: str, limit_s: float) -> None:
        Exception.__init__(
            self,
            f"more steps of model {model!r} are asked for than it can run, and those that wait would wait over "
            f"{limit_s:g} s: try again after a pause, add replicas, or raise --max-queue-wait-s",
        )


class ServerOverloadedError(QueueFullError):
    """More calls come than the server can look at."""

    def __init__(self, limit_s: float) -> None:
        Exception.__init__(
            self,
            f"more calls come than this server can take, and this one would wait over {limit_s:g} s: try again after a "
            "pause, add replicas, or raise --max-queue-wait-s",
        )


class StepFailedError(ServingError):
    """The model failed on a message's inputs; the session is as it was before the message."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"model {model!r} failed on these inputs; the session is as it was before this message, and the "
            "server's log has the cause"
        )


class OutputNotFiniteError(StepFailedError):
    """The model gave outputs that are not finite; the session is as it was before the message."""

    def __init__(self, model: str, step: int) -> None:
        Exception.__init__(
            self,
            f"model {model!r} gave an output that is not finite at step {step}; the session is as it was before "
            "this message: send other inputs, or reset it",
        )
        self.step = step


class StepTimedOutError(ServingError):
    """A step took longer than one may; the session is as it was before the message."""

    def __init__(self, model: str, limit_s: float) -> None:
        super().__init__(
            f"a step of model {model!r} took over {limit_s:g} s and was ended; the session is as it was before this "
            "message: send other inputs, or raise --step-timeout-s"
        )


class ServerStoppingError(ServingError):
    """The server is stopping and takes no new work."""

    def __init__(self) -> None:
        super().__init__("the server is stopping: connect again and repeat the call")


class StoreSettingsError(StartupError):
    """The store cannot be used as asked: its URL, its place or its settings; the message says what to change."""


class StoreError(ServingError):
    """The store did not do what it was asked."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or did not answer in time."""

    def __init__(self, cause: object = "") -> None:
        super().__init__(
            "the session store cannot be reached: repeat the call" + (f" ({cause})" if cause else "")
        )


class StoreFullError(StoreError):
    """The store has no room; nothing was changed."""

    def __init__(self) -> None:
        super().__init__(
            "the session store is full, and nothing was changed: delete sessions, or give the store more room"
        )


class StoreCorruptError(StoreError):
    """The store, or what it keeps of a session, is damaged."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is damaged in the store: restore the store from a backup, or delete the session"
        )


class LeaseLapsedError(ServingError):
    """This replica's lease has run out, so that others may have taken its sessions over."""

    def __init__(self) -> None:
        super().__init__("this replica was cut off from the session store for too long: repeat the call")


class ModelMismatchError(ServingError):
    """A session's state comes from another model file than the one that is served under its name and version."""

    def __init__(self, model: str, digest: str, served_digest: str) -> None:
        super().__init__(
            f"the state comes from another file of model {model!r} (digest {digest[:12]}) than is served "
            f"({served_digest[:12]}): serve that file, under a version of its own, or create a new session"
        )


class ModelNotLoadedError(ServingError):
    """A session's version of its model is not in service."""

    def __init__(self, session_id: str, model: str) -> None:
        super().__init__(
            f"session {shown_id(session_id)!r} belongs to model {model!r}, which is not in service: put it back into "
            "the models directory, or delete the session"
        )


class RecoveryError(ServingError):
    """A session cannot be brought back as it was."""


class SessionCorruptError(RecoveryError):
    """What the store keeps of a session is damaged."""

    def __init__(self, session_id: str, problem: str) -> None:
        super().__init__(
            f"what the store keeps of session {shown_id(session_id)!r} is damaged ({problem}): restore the store "
            "from a backup, or delete the session and replay its inputs in a new one"
        )


class SessionQuarantinedError(RecoveryError):
    """A session's recovery failed too often; it is not tried again."""

    def __init__(self, session_id: str, num_attempts: int) -> None:
        super().__init__(
            f"session {shown_id(session_id)!r} is quarantined: bringing it back failed {num_attempts} times; the log "
            "has the cause; delete the session and replay its inputs in a new one"
        )


class RecoveryNotExactError(RecoveryError):
    """A session's records were written on another machine or build, so a replay could differ in the last bits."""

    def __init__(self, session_id: str, theirs: str, ours: str) -> None:
        super().__init__(
            f"session {shown_id(session_id)!r} ran on another machine or build ({theirs}; here: {ours}), and to "
            "replay its steps could change its last bits: start a server there, or allow it with --recovery approximate"
        )


class SessionMovedError(ServingError):
    """Another replica has the session, or is being given it."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {shown_id(session_id)!r} is moving to another replica: repeat the call")


class WrongReplicaError(SessionMovedError):
    """An item of a batch belongs to another replica."""

    def __init__(self, session_id: str, owner: str) -> None:
        Exception.__init__(
            self,
            f"session {shown_id(session_id)!r} is on another replica: send its steps in a call with its own "
            "ntm-routing-key",
        )
        self.owner = owner

    @property
    def details(self) -> dict[str, str]:
        """The replica: items with the same one can be sent together."""
        return {"replica": self.owner}


class EngineFailedError(ServingError):
    """A batch failed, whatever its inputs; every session in it is as it was."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"a batch of model {model!r} failed; its sessions are as they were, and the server's log has the cause"
        )


class SecurityFileError(StartupError):
    """A certificate, a key or a file of tokens cannot be used."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path} cannot be used: {problem}")


class UnauthenticatedError(ServingError):
    """The caller does not show who it is, or it is nobody who is known here."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"it is not known who calls: {problem}")


class PermissionDeniedError(ServingError):
    """The caller is known, and may not do this."""


class QuotaExceededError(ServingError):
    """The caller has taken what one principal may, of sessions, of room or of steps."""

    def __init__(self, principal: str, problem: str, retry_after_s: float) -> None:
        super().__init__(f"the quota of principal {principal!r} is used up: {problem}")
        self.retry_after_s = retry_after_s
