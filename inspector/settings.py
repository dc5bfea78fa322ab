"""Settings: what can be chosen, from flags and then the environment. Read once, in `__main__`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from inspector.errors import SettingsError
from ntm import AsyncClient, Tls


class InspectorSettings(BaseSettings):
    """Show the sessions of a running server as a web page."""

    model_config = SettingsConfigDict(
        env_prefix="NTM_INSPECTOR_",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_prog_name="python -m inspector",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    address: CliPositionalArg[str | None] = None
    """HOST:PORT of the server to look at. Not set: one is started on the models directory, for as long as this runs."""
    server_tls: bool = False
    """Whether to encrypt what goes to the server and to verify it, by the authorities that come with gRPC."""
    server_authorities: Path | None = None
    """PEM file with the authorities that the server's certificate must come from; with it server_tls is on."""
    server_certificate: Path | None = None
    """PEM file with the certificate to show to a server that asks for one; with it server_tls is on."""
    server_key: Path | None = None
    """PEM file with that certificate's private key."""
    server_token_file: Path | None = None
    """File with the bearer token that says to the server who calls."""
    models: Path = Path("models")
    """Directory of models for the server that is started."""
    listen: str = "127.0.0.1:8050"
    """HOST:PORT of the page; port 0 takes a free one, which is printed. Another than a loopback address needs
    token_file, or tls_certificate and tls_key."""
    token_file: Path | None = None
    """File with a secret in it that whoever opens the page has to know. Not set: none is asked for."""
    tls_certificate: Path | None = None
    """PEM file with the certificate chain to serve the page with. Not set: plain HTTP."""
    tls_key: Path | None = None
    """PEM file with the certificate's private key."""
    recording_limit_mib: Annotated[int, Field(ge=1)] = 1024
    """MiB of states that are kept to look back at, of all sessions together."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds to wait for one answer of the server."""

    @model_validator(mode="after")
    def _fit_together(self) -> InspectorSettings:
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"listen ({self.listen}) must be HOST:PORT, such as 127.0.0.1:8050")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if (self.server_certificate is None) != (self.server_key is None):
            raise ValueError("server_certificate and server_key go together: give both or neither")
        if not self.is_loopback and self.token_file is None and self.tls_certificate is None:
            raise ValueError(
                f"listen ({self.listen}) can be reached from other machines: give token_file, a file with a secret "
                "that visitors must know, or tls_certificate and tls_key, or listen on 127.0.0.1"
            )
        return self

    @property
    def host(self) -> str:
        """The host to listen on, without the brackets of an IPv6 address."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to listen on."""
        return int(self.listen.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the page."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def token(self) -> str | None:
        """The secret that visitors must know.

        Raises:
            SettingsError: its file cannot be read, or is too short to be a secret.
        """
        if self.token_file is None:
            return None
        token = _read(self.token_file)
        if len(token) < 16 or not token.isascii() or any(character.isspace() for character in token):
            raise SettingsError(
                f"the token in {self.token_file} must be 16 ASCII characters or more without spaces: try "
                "`openssl rand -hex 16`"
            )
        return token

    def tls(self) -> bool | Tls:
        """How to speak to the server."""
        if self.server_authorities is None and self.server_certificate is None:
            return self.server_tls
        return Tls(
            authorities=self.server_authorities, certificate=self.server_certificate, key=self.server_key
        )

    def connect(self, address: str) -> AsyncClient:
        """A client of the server at an address; make it in the event loop that uses it."""
        token = None if self.server_token_file is None else _read(self.server_token_file)
        return AsyncClient(address, tls=self.tls(), token=token, retry_for_s=2.0, timeout_s=self.timeout_s)

    def connection_lines(self, address: str) -> list[str]:
        """Python that connects to the server as this does; of secrets it has the names of their files."""
        tls, arguments = self.tls(), [repr(address)]
        if isinstance(tls, Tls):
            given = {
                "authorities": self.server_authorities,
                "certificate": self.server_certificate,
                "key": self.server_key,
            }
            files = [f"{name}={str(path)!r}" for name, path in given.items() if path is not None]
            arguments.append(f"tls=Tls({', '.join(files)})")
        elif tls:
            arguments.append("tls=True")
        if self.server_token_file is not None:
            arguments.append(f"token=open({str(self.server_token_file)!r}).read().strip()")
        names = "Client, Tls" if isinstance(tls, Tls) else "Client"
        return [f"from ntm import {names}", "", f"client = Client({', '.join(arguments)})"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read the token file {path}: {error}") from error
