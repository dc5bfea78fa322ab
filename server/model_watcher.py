"""Model updates: follow the models directory while the server runs.

Every look compares the directory with what is served. A new version is loaded beside the others, in a thread. One whose
file is gone takes no new sessions, and is unloaded when its last session has ended or its time is up. A file that
changed under a version in service is not taken: its sessions' states belong to the file they began with. Whatever is
wrong with one file disturbs no other; it is logged once for each change of that file, and shown in a metric.

`repository.py` finds the files; `lifecycle.py` starts the looking, and loads what there is at the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import structlog

from server.errors import ModelFileError, ServingError, StoreError
from server.metrics import Metrics
from server.model.repository import ModelFile, Stamp, find
from server.model.spec import StepModel
from server.runtime.runner import ModelRunner
from server.sessions.manager import SessionManager
from server.sessions.served_model import ServedModel

log = structlog.get_logger()


@dataclass(frozen=True)
class _Problem:
    kind: Literal["load_failed", "changed_in_place"]
    stamp: Stamp
    """Of the file that has it: another one may be better."""


@dataclass
class _Departure:
    served: ServedModel
    since_s: float
    """By the monotonic clock."""
    last_seen_session: str = ""
    """A session that it waits for: there is none with a lower id, unless the search is to begin anew ("")."""


class ModelWatcher:
    """Keeps what is served in step with the models directory. Models are named by their labels, NAME/VERSION."""

    def __init__(
        self,
        root: Path,
        loaded: Iterable[ModelFile],
        sessions: SessionManager,
        metrics: Metrics,
        load: Callable[[StepModel], ModelRunner],
        serve: Callable[[ModelRunner], ServedModel],
        unload_after_s: float | None,
        load_timeout_s: float,
    ) -> None:
        """Nothing is looked at yet.

        Args:
            root: the models directory.
            loaded: the files of the versions in service.
            sessions: what serves the models.
            metrics: where problems are shown.
            load: puts a model on the device; called in a thread, raises ServingError.
            serve: starts a loaded model; called in the event loop.
            unload_after_s: seconds that a version whose file is gone waits for its sessions, or None for ever.
            load_timeout_s: seconds that reading a model and trying it out may take.
        """
        self._root = root
        self._sessions = sessions
        self._metrics = metrics
        self._load = load
        self._serve = serve
        self._unload_after_s = unload_after_s
        self._load_timeout_s = load_timeout_s
        self._served_stamps = {file.label: file.stamp for file in loaded}
        self._last_stamps = dict(self._served_stamps)
        """Of the look before: a file that has changed since may still be being written."""
        self._problems: dict[str, _Problem] = {}
        self._departures: dict[str, _Departure] = {}
        self._can_look = True
        self.unloading: dict[str, ServedModel] = {}
        """Out of service; what is left of their sessions is on its way out."""

    async def keep_looking(self, every_s: float) -> None:
        """Look every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except Exception as error:  # the next look may go better, and nobody else would say
                log.error("looking after models failed unexpectedly", exc_info=error)

    async def look(self) -> None:
        """Compare the models directory with what is served, and do what there is to do."""
        files = await self._find()
        if files is None:
            return
        for label in self._problems.keys() - files.keys():
            self._clear_problem(label)
        for served in [*self._sessions.models]:
            await self._compare(served, files.get(served.model.label))
        for departure in [*self._departures.values()]:
            await self._see_off(departure)
        for served in [*self.unloading.values()]:
            await self._unload(served)
        in_use = {served.model.label for served in self._sessions.models} | self.unloading.keys()
        for label, file in files.items():
            if label not in in_use:
                await self._try_to_load(file)
        self._last_stamps = {label: file.stamp for label, file in files.items()}

    async def _find(self) -> dict[str, ModelFile] | None:
        """The files there are; a directory that cannot be read is no reason to let its models go."""
        try:
            files = await asyncio.to_thread(find, self._root)
        except OSError as error:
            if self._can_look:
                log.error("the models directory cannot be read; what is served stays", error=str(error))
            self._can_look = False
            return None
        self._can_look = True
        return {file.label: file for file in files}

    # Versions in service.

    async def _compare(self, served: ServedModel, file: ModelFile | None) -> None:
        """Let a version whose file is gone leave, and one whose file is back stay."""
        label = served.model.label
        is_there = file is not None and await self._is_file_of(served, file)
        if file is None and not served.is_draining:
            served.is_draining = True
            self._departures[label] = _Departure(served, monotonic())
            log.info(
                "a model was removed: it takes no new sessions",
                model=label,
                num_sessions_in_memory=served.num_sessions,
                unload_after_s=self._unload_after_s,
            )
        elif is_there and served.is_draining:
            served.is_draining = False
            del self._departures[label]
            log.info("a removed model is back: it takes new sessions", model=label)

    async def _is_file_of(self, served: ServedModel, file: ModelFile) -> bool:
        """Whether a file is the one that is served, if only copied anew."""
        label = file.label
        if file.stamp != self._served_stamps[label]:
            if not self._is_worth_loading(file):
                return False
            try:
                model = await asyncio.to_thread(file.load)
                is_same = (model.digest, model.spec) == (served.model.digest, served.model.spec)
            except (ModelFileError, OSError):
                is_same = False
            if file.has_changed:
                return False
            if not is_same:
                self._note_problem(file, "changed_in_place")
                log.error(
                    "a model file was changed in place: its version is served on from memory, as it was; publish the "
                    "new file under a new version, and put the old one back",
                    model=label,
                    path=str(file.path),
                )
                return False
            self._served_stamps[label] = file.stamp
        self._clear_problem(label)
        return True

    async def _see_off(self, departure: _Departure) -> None:
        """Take a version that leaves out of service when its last session has ended, or its time is up."""
        served, limit_s = departure.served, self._unload_after_s
        is_overdue = limit_s is not None and monotonic() - departure.since_s >= limit_s
        if not is_overdue and await self._has_sessions(departure):
            return
        label = served.model.label
        del self._departures[label], self._served_stamps[label]
        self.unloading[label] = served

    async def _has_sessions(self, departure: _Departure) -> bool:
        """Whether a version has sessions; where the store cannot say, it may have."""
        served, begin = departure.served, departure.last_seen_session
        try:
            found = await self._sessions.find_session_of(served, begin)
            if found is None and begin:
                found = await self._sessions.find_session_of(served, "")
        except StoreError as error:
            log.warning("a removed model cannot be unloaded yet", model=served.model.label, error=str(error))
            return True
        departure.last_seen_session = found or ""
        return found is not None or not served.table.is_empty  # one may be on its way into the store

    async def _unload(self, served: ServedModel) -> None:
        """Free what a version took, once nobody uses it."""
        if not self._sessions.take_out_of_service(served):
            return
        label = served.model.label
        await asyncio.to_thread(served.close)
        self._metrics.forget(label)
        self._clear_problem(label)  # another file in its place has no sessions now
        del self.unloading[label]
        log.info("model unloaded", model=label)

    # Versions to come.

    async def _try_to_load(self, file: ModelFile) -> None:
        """Put a version into service, if its file is whole and good."""
        if not self._is_worth_loading(file):
            return
        try:
            loading = asyncio.to_thread(lambda: self._load(file.load()))
            # Its thread cannot be ended, and is left behind: the others' models are looked after.
            try:
                runner = await asyncio.wait_for(loading, self._load_timeout_s)
            except TimeoutError:
                problem = f"it was not loaded and tried out within {self._load_timeout_s} s"
                raise ModelFileError(str(file.path), [problem]) from None
        except Exception as error:  # ONNX Runtime and numpy have their own, for want of memory among others
            if file.has_changed:
                return  # it was read while being written
            self.note_unloadable(file, error)
            return
        if file.has_changed:
            return
        self._clear_problem(file.label)
        self._served_stamps[file.label] = file.stamp
        self._sessions.models.add(self._serve(runner))

    def _is_worth_loading(self, file: ModelFile) -> bool:
        """Whether a file has stayed as it is since the look before, and is not known to be of no use."""
        problem = self._problems.get(file.label)
        is_settled = self._last_stamps.get(file.label) == file.stamp
        return is_settled and (problem is None or problem.stamp != file.stamp)

    # Problems.

    def note_unloadable(self, file: ModelFile, error: Exception) -> None:
        """A version cannot be put into service: say so, and try it again when its file changes."""
        self._note_problem(file, "load_failed")
        log.error(
            "a model cannot be served; it is tried again when its file changes",
            model=file.label,
            error=str(error),
            exc_info=None if isinstance(error, ServingError) else error,
        )

    def _note_problem(self, file: ModelFile, kind: Literal["load_failed", "changed_in_place"]) -> None:
        self._clear_problem(file.label)
        self._problems[file.label] = _Problem(kind, file.stamp)
        self._metrics.report_file_problem(file.label, kind)

    def _clear_problem(self, label: str) -> None:
        if problem := self._problems.pop(label, None):
            self._metrics.clear_file_problem(label, problem.kind)
