"""A store's URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import StoreSettingsError
from server.store.opening import open_store


def test_none_keeps_sessions_in_the_process():
    assert open_store("none").kind == "none"


def test_a_path_after_three_slashes_is_relative_and_after_four_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    open_store("sqlite:///data/a.db").close()
    open_store(f"sqlite:///{tmp_path}/data/with%20space.db").close()

    assert {"a.db", "with space.db"} < {file.name for file in Path("data").iterdir()}


@pytest.mark.parametrize(
    "url", ["", "sqlite://", "sqlite:///", "sqlite://host/a.db", "postgres://h/db", "/a.db"]
)
def test_what_names_no_store_is_refused_with_what_does(url: str):
    with pytest.raises(
        StoreSettingsError, match=r"names no store: give none, sqlite:///.*, sqlite:////|names no store"
    ):
        open_store(url)
