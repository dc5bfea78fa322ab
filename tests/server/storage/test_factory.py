"""A store's URL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.errors import StoreSettingsError
from server.storage.factory import open_store
from tests.valkey import ValkeyServer

ROOT = Path(__file__).parents[3]


def test_none_keeps_sessions_in_the_process():
    assert open_store("none").kind == "none"


def test_a_path_after_three_slashes_is_relative_and_after_four_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    open_store("sqlite:///data/a.db").close()
    open_store(f"sqlite:///{tmp_path}/data/with%20space.db").close()

    assert {"a.db", "with space.db"} < {file.name for file in Path("data").iterdir()}


def test_a_redis_url_connects_to_that_server(valkey: ValkeyServer):
    store = open_store(valkey.url, sync="normal")

    assert store.kind == "redis"
    store.close()


def test_who_uses_no_redis_does_not_load_its_client():
    check = "import sys, server.storage.factory; sys.exit('redis' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "url", ["", "sqlite://", "sqlite:///", "sqlite://host/a.db", "postgres://h/db", "/a.db"]
)
def test_what_names_no_store_is_refused_with_what_does(url: str):
    with pytest.raises(StoreSettingsError, match=r"names no store: give none, sqlite:///.* or redis://"):
        open_store(url)
