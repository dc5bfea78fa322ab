"""Models: the versions of models that are in service."""

from __future__ import annotations

from collections.abc import Iterator

from server.errors import ModelNotFoundError
from server.sessions.served_model import ServedModel


class ServedModels:
    """The versions in service, by name and version."""

    def __init__(self) -> None:
        """None is."""
        self._served: dict[tuple[str, int], ServedModel] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        """Each of them; they may come and go meanwhile."""
        return iter([*self._served.values()])

    def add(self, served: ServedModel) -> None:
        """Put a version into service."""
        self._served[served.model.name, served.model.version] = served

    def remove(self, served: ServedModel) -> None:
        """Take a version out of service, if it is in."""
        self._served.pop((served.model.name, served.model.version), None)

    def get(self, name: str, version: int) -> ServedModel | None:
        """A version in service."""
        return self._served.get((name, version))

    def find(self, name: str, version: int | None) -> ServedModel:
        """A model by name; without a version the newest that takes new sessions.

        Raises:
            ModelNotFoundError: there is none.
        """
        if version is None:
            version = max(
                (v for (n, v), served in self._served.items() if n == name and not served.is_draining),
                default=None,
            )
        served = self._served.get((name, version)) if version is not None else None
        if served is None:
            labels = sorted(s.model.label for s in self._served.values() if not s.is_draining)
            raise ModelNotFoundError(name, version, labels)
        return served

    def find_alike(self, name: str, version: int, digest: str) -> tuple[ServedModel, list[ServedModel]]:
        """A version, or else the newest, and the versions of the same file, those that take new sessions first.

        Raises:
            ModelNotFoundError: no version of the name is in service.
        """
        served = self.get(name, version) or self.find(name, None)
        alike = [s for (n, _), s in self._served.items() if n == name and s.model.digest == digest]
        return served, sorted(alike, key=lambda s: s.is_draining)
