"""Who may ask the inspector, and what a browser may do with what it answers."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from inspector.errors import SettingsError
from inspector.settings import InspectorSettings
from tests.conftest import ROOT
from tests.inspector.conftest import InspectorProcess, inspecting

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def guarded(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InspectorProcess]:
    """An inspector that asks for a token."""
    path = tmp_path_factory.mktemp("secrets") / "token"
    path.write_text(TOKEN)
    with inspecting(served, "--token-file", str(path)) as process:
        yield process


def ask(url: str, method: str, path: str, headers: dict[str, str], body: str | None = None) -> int:
    """The status of a request with exactly these headers."""
    status, _ = answer(url, method, path, headers, body)
    return status


def answer(
    url: str, method: str, path: str, headers: dict[str, str], body: str | None = None
) -> tuple[int, http.client.HTTPMessage]:
    netloc = urlsplit(url).netloc
    connection = http.client.HTTPConnection(netloc, timeout=20)
    connection.request(method, path, body, {"Host": netloc, **headers})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, response.headers


def own(url: str) -> dict[str, str]:
    return {"Origin": url.rstrip("/")}


def test_what_acts_needs_the_inspectors_own_origin(inspector: InspectorProcess) -> None:
    url, body = inspector.url, json.dumps({"model": "copy"})

    assert ask(url, "POST", "/api/sessions", own(url), body) == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        assert ask(url, "POST", "/api/sessions", {"Origin": origin}, body) == 403, origin
    assert ask(url, "POST", "/api/sessions", {}, body) == 403
    assert ask(url, "DELETE", "/api/sessions/any", {"Origin": "http://evil.example"}) == 403


def test_other_sites_read_nothing(inspector: InspectorProcess) -> None:
    url = inspector.url

    assert ask(url, "GET", "/api/server", {"Sec-Fetch-Site": "same-origin"}) == 200
    for site in ("cross-site", "same-site"):
        assert ask(url, "GET", "/api/server", {"Sec-Fetch-Site": site}) == 403
        assert ask(url, "GET", "/static/main.js", {"Sec-Fetch-Site": site}) == 403


def test_another_name_that_leads_to_this_machine_is_refused(inspector: InspectorProcess) -> None:
    port = urlsplit(inspector.url).port

    for host in (f"localhost:{port}", f"[::1]:{port}", f"127.0.0.1:{port}"):
        assert ask(inspector.url, "GET", "/api/server", {"Host": host}) == 200, host
    for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "[", ""):
        assert ask(inspector.url, "GET", "/api/server", {"Host": host}) in (400, 403), host


def test_no_script_but_the_pages_own_runs_and_no_text_becomes_markup(inspector: InspectorProcess) -> None:
    for path in ("/", "/static/main.js", "/api/server", "/nowhere"):
        _, headers = answer(inspector.url, "GET", path, {})
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers
        assert "Set-Cookie" not in headers


def test_the_page_has_no_inline_code_and_makes_no_markup() -> None:
    static = ROOT / "inspector" / "static"
    page = (static / "index.html").read_text()

    assert page.count("<script") == page.count('<script type="module" src="/static/') == 1
    assert " style=" not in page
    assert " on" not in page.replace(" on-", "").replace(" one ", "").split("<body>")[0]
    for script in static.glob("*.js"):
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:"):
            assert forbidden not in script.read_text(), (script.name, forbidden)


def test_with_a_token_nothing_is_told_without_it(guarded: InspectorProcess) -> None:
    url = guarded.url

    assert ask(url, "GET", "/", {}) == 200
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for path in ("/api/server", "/api/sessions", "/api/sessions/any/timeline", "/api/nowhere"):
            assert ask(url, "GET", path, given) == 401, (given, path)
    assert ask(url, "GET", "/api/server", {"Authorization": f"Bearer {TOKEN}"}) == 200


def test_a_body_that_is_too_large_or_no_json_is_refused(inspector: InspectorProcess) -> None:
    url = inspector.url

    for body in ("{", "[]", '"text"', "", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        assert ask(url, "POST", "/api/sessions", own(url), body) == 400, body
    assert ask(url, "POST", "/api/import", own(url), "x" * 100) == 400
    assert ask(url, "GET", "/api/sessions/none/timeline", {}) == 404
    assert ask(url, "GET", "/static/../app.py", {}) == 404
    assert ask(url, "PUT", "/api/sessions", own(url), "{}") == 405


def test_it_listens_on_other_addresses_only_with_a_token_or_tls(tmp_path: Path) -> None:
    def settings(**given: object) -> InspectorSettings:
        return InspectorSettings(**given)  # type: ignore[arg-type]

    for listen in ("0.0.0.0:8050", "[::]:8050", "192.0.2.1:80", "example.org:80"):
        with pytest.raises(ValidationError, match="token_file"):
            settings(listen=listen)
        assert settings(listen=listen, token_file=tmp_path / "token").host
        assert settings(listen=listen, tls_certificate=tmp_path / "c", tls_key=tmp_path / "k").host
    for listen in ("127.0.0.1:0", "localhost:8050", "[::1]:8050", "127.8.8.8:1"):
        assert settings(listen=listen).is_loopback
    with pytest.raises(ValidationError, match="go together"):
        settings(tls_key=tmp_path / "k")
    (tmp_path / "short").write_text("secret")
    for name in ("short", "missing"):
        with pytest.raises(SettingsError, match="token"):
            settings(token_file=tmp_path / name).token()


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--listen", "0.0.0.0:0"], 2, "listen (0.0.0.0:0)"),
        (["--nonsense"], 2, "nonsense"),
        (["--models", "/nowhere", "--listen", "127.0.0.1:0"], 1, "does not start"),
    ],
)
def test_a_start_that_cannot_be_says_why(flags: list[str], status: int, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "inspector", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_python_lines_name_the_files_of_secrets_and_not_the_secrets(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2hunter2")
    settings = InspectorSettings(server_token_file=tmp_path / "token", server_authorities=tmp_path / "ca.pem")

    lines = "\n".join(settings.connection_lines("host:1"))

    assert "hunter2" not in lines
    assert f"token=open({str(tmp_path / 'token')!r})" in lines
    assert f"tls=Tls(authorities={str(tmp_path / 'ca.pem')!r})" in lines
