"""Settings: everything an operator can choose, from flags, the environment and a file, in that order.

Read once, in `__main__`; values are passed down from there.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.security import (
    JWT_ALGORITHMS,
    Authenticator,
    JwtIssuer,
    JwtVerifier,
    Quotas,
    TlsFiles,
    TlsIdentity,
    TokenFile,
    is_loopback,
)

ENV_PREFIX = "NTM_SERVER_"
OTLP_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class ServerSettings(BaseSettings):
    """Serve step-wise models: each session's memory held between calls, many sessions run together."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    models: Path = Path("models")
    """Directory of models, laid out NAME/VERSION/model.onnx."""
    model_poll_s: Seconds = 3.0
    """Seconds between two looks into that directory for versions that came, went or changed."""
    model_load_timeout_s: Seconds = 300.0
    """Seconds that reading a model and trying it out may take. One that takes longer stops the start; while the server
    runs it is not served."""
    model_errors: Literal["fail", "skip"] = "fail"
    """What a file that cannot be served does at the start: keep the server from starting (fail), or let it serve the
    others (skip); the log and the metric ntm_model_file_problem say which, and it is tried again when it changes."""
    step_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """Seconds that a run on the device may take: one step, or up to 32 where steps are short. One that takes longer is
    ended and its message fails; the others of its batch are run again without it."""
    unload_after_s: Seconds | None = None
    """Seconds after which a version that was removed from the directory is unloaded although it has sessions: they wait
    in the store until it is back, or end where there is no store. Not set: it is unloaded when the last has ended."""
    listen: str = "127.0.0.1:50051"
    """HOST:PORT to listen on; port 0 takes a free one, which the log names."""
    transport: Literal["auto", "native", "grpcio"] = "auto"
    """What carries gRPC: native works outside the interpreter's lock and answers single calls several times as fast;
    grpcio has TLS. auto takes native where it can serve what is asked; the log says which it is and why."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where models run: auto takes CUDA where it works and says so when it falls back to the CPU."""
    device_id: Annotated[int, Field(ge=0)] = 0
    """Index of the CUDA device."""
    device_memory_limit_mib: Count | None = None
    """MiB that each graph of a model may take on the CUDA device for its work, beside the sessions' states. Not set:
    what there is."""
    store: str = "sqlite:///data/sessions.sqlite3"
    """Where sessions are kept: sqlite:///RELATIVE/FILE or sqlite:////ABSOLUTE/FILE, for one server;
    redis://HOST:PORT/DB (Valkey or Redis), for one or several; none: in memory only, and they end with the server."""
    sync: Literal["full", "normal"] = "full"
    """What an answered step is to survive: a power failure (full), or the server's death (normal). The server does not
    start on a store that cannot promise it."""
    store_limit_mib: Count | None = None
    """MiB that the SQLite file may take. Not set: what the disk has."""
    store_timeout_s: Seconds = 2.0
    """Seconds to wait for an answer from Valkey or Redis."""
    snapshot_every_steps: Count = 256
    """Steps of a session after which its whole state is written: what a recovery has to replay at most, about."""
    recovery: Literal["exact", "approximate"] = "exact"
    """Whether a session whose steps must be replayed on another machine or build than they ran on is refused (exact),
    or replayed and marked, since its last bits may differ (approximate)."""
    lease_s: Seconds = 3.0
    """Seconds after which other replicas may take the sessions of one that died."""
    handover_timeout_s: Seconds = 10.0
    """Seconds that a call waits for a session that another replica has."""
    max_resident_sessions: Count = 1024
    """Sessions of one model whose state is on the device at once; memory for twice as many, and for batches, is set
    aside there. Those unused longest wait in the store; without one, this is how many there can be."""
    max_batch_size: Count = 64
    """Sessions run together in one step at most."""
    max_steps_per_message: Count = 1024
    """Steps in one message for one session at most."""
    max_sessions_per_batch: Count = 1024
    """Sessions in one BatchStep at most."""
    max_message_bytes: Annotated[int, Field(ge=128 * 1024)] = 4 * 1024 * 1024
    """Bytes of one request or answer at most. Most gRPC clients accept no more than 4 MiB unless told to."""
    max_pending_messages: Count = 4096
    """Messages that may wait for one model; one more is refused with RESOURCE_EXHAUSTED."""
    max_queue_wait_s: Seconds = 0.5
    """Seconds that a message may wait for its first turn. Where messages wait half of that, new ones are refused with
    RESOURCE_EXHAUSTED until fewer wait, those first whose principal has more than its share in the queue."""
    retry_window_steps: Count = 1024
    """Steps, at least, for which each session keeps its answers, for calls that are repeated."""
    idle_limit_s: Seconds | None = None
    """Seconds without a call, while some server is up, after which a session ends. Not set: they end when deleted."""
    max_retired_ids: Count = 100_000
    """Ids of ended sessions that are kept from being used again, for 24 hours at most; the oldest go first."""
    sequence_idle_s: Seconds = 60.0
    """Seconds without a request after which a sequence of the inference protocol ends that was left without END."""
    drain_timeout_s: Seconds = 30.0
    """Seconds that calls in progress have to finish after SIGTERM."""
    metrics_listen: str | None = None
    """HOST:PORT for Prometheus to scrape, over TLS where the server has a certificate. Not set: no metrics endpoint."""
    triton_metrics: bool = False
    """Tell the metrics that Triton's dashboards read too, by Triton's names."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector that takes spans by OTLP over HTTP, such as http://127.0.0.1:4318; the standard
    variable OTEL_EXPORTER_OTLP_ENDPOINT says the same. Not set: nothing is traced. It needs the extra otel."""
    health_listen: str | None = None
    """HOST:PORT where health alone is told, in plaintext, for probes that do not speak TLS. Not set: nowhere else."""
    insecure: bool = False
    """Listen in plaintext beyond this machine: whoever is on the way can read and change everything."""
    tls_cert: Path | None = None
    """PEM file of the server's certificate, and those between it and its authority; read again when it changes."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    tls_client_ca: Path | None = None
    """PEM file of authorities: every client must show a certificate of one of them. Its common name is the principal
    that calls, where there are neither tokens nor JWTs."""
    tokens: Path | None = None
    """File with a line NAME sha256:HEX for each bearer token, as `python -m server.security.tokens NAME` makes them;
    read again when it changes."""
    jwt_issuer: str | None = None
    """The `iss` claim of JWTs that are believed. With it go jwt_audience and jwt_keys."""
    jwt_audience: str | None = None
    """The `aud` claim that they must have."""
    jwt_keys: str | None = None
    """Their issuer's public keys: a file with a key as PEM or a JWK set, or the https URL of a JWK set."""
    jwt_algorithms: str = "RS256,ES256,EdDSA"
    """Signatures of JWTs that are accepted."""
    jwt_principal_claim: str = "sub"
    """The claim of a JWT that names the principal."""
    admins: str | None = None
    """Principals, with commas between them, that may list, read and delete the sessions of others."""
    unowned_sessions_owner: str | None = None
    """The principal that sessions belong to which were made before callers were told apart. Not set: nobody's, and only
    an admin finds them."""
    max_sessions_per_principal: Count | None = None
    """Living sessions that a principal may have. Not set: no limit."""
    max_stored_mib_per_principal: Count | None = None
    """MiB that a principal's sessions may take in the store, each reckoned at the most that it can take."""
    max_steps_per_s_per_principal: Annotated[float, Field(gt=0)] | None = None
    """Steps that each server runs for a principal in a second."""
    max_queued_steps_per_principal: Count | None = None
    """Steps of a principal that may wait or run at once on each server."""
    log_format: Literal["console", "json"] = "console"
    """How the log is written, to standard error."""
    config: Path | None = None
    """TOML file with any of these settings; flags and the environment go before it."""

    @model_validator(mode="after")
    def _fit_together(self) -> ServerSettings:
        if self.max_steps_per_message > self.retry_window_steps:
            raise ValueError(
                f"max_steps_per_message ({self.max_steps_per_message}) must be at most retry_window_steps "
                f"({self.retry_window_steps}), or a message could not be repeated"
            )
        if self.handover_timeout_s <= self.lease_s:
            raise ValueError(
                f"handover_timeout_s ({self.handover_timeout_s}) must be more than lease_s ({self.lease_s}), or a call "
                "would give up before a dead replica's sessions can be taken over"
            )
        if self.otlp_endpoint is not None:
            url = urlsplit(self.otlp_endpoint)
            if url.scheme not in ("http", "https") or not url.hostname or url.path.endswith("/v1/traces"):
                raise ValueError(
                    f"otlp_endpoint ({self.otlp_endpoint}) must be the http or https URL of a collector, without the "
                    "path /v1/traces, such as http://127.0.0.1:4318"
                )
        for name in ("listen", "metrics_listen", "health_listen"):
            address = getattr(self, name)
            if address is None:
                continue
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                raise ValueError(f"{name} ({address}) must be HOST:PORT, such as 127.0.0.1:50051")
            is_plain = self.tls_cert is None and name != "health_listen"
            if is_plain and not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"{name} ({address}) is reached from other machines, in plaintext: give tls_cert and tls_key, "
                    "listen on 127.0.0.1, or say insecure"
                )
        return self

    @model_validator(mode="after")
    def _say_who_calls(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "tls_client_ca asks clients for certificates, which goes with tls_cert and tls_key"
            )
        if len({self.jwt_issuer is None, self.jwt_audience is None, self.jwt_keys is None}) > 1:
            raise ValueError("jwt_issuer, jwt_audience and jwt_keys go together: give all or none")
        algorithms = _names(self.jwt_algorithms)
        if not algorithms or not {*algorithms} <= {*JWT_ALGORITHMS}:
            raise ValueError(
                f"jwt_algorithms ({self.jwt_algorithms}) must be of {', '.join(JWT_ALGORITHMS)}: signatures that only "
                "the issuer can make"
            )
        if self.admins and not self.tells_callers_apart:
            raise ValueError(
                "admins are known by tokens, JWTs or certificates: give tokens, jwt_keys or tls_client_ca"
            )
        return self

    @property
    def tells_callers_apart(self) -> bool:
        """Whether sessions belong to principals."""
        return not (self.tls_client_ca is None and self.tokens is None and self.jwt_keys is None)

    def authenticator(self) -> Authenticator:
        """Who says who calls.

        Raises:
            SecurityFileError: a file cannot be used.
        """
        jwts = None
        if self.jwt_keys is not None:
            assert self.jwt_issuer is not None
            assert self.jwt_audience is not None
            jwts = JwtVerifier(
                JwtIssuer(
                    self.jwt_issuer,
                    self.jwt_audience,
                    self.jwt_keys,
                    _names(self.jwt_algorithms),
                    self.jwt_principal_claim,
                )
            )
        return Authenticator(
            tokens=None if self.tokens is None else TokenFile(self.tokens),
            jwts=jwts,
            certificates=self.tls_client_ca is not None,
            admins=_names(self.admins),
            unowned_sessions_owner=self.unowned_sessions_owner or "",
        )

    def tls_identity(self) -> TlsIdentity | None:
        """The server's certificate, if it has one.

        Raises:
            SecurityFileError: a file cannot be used.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsIdentity(TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca))

    @property
    def quotas(self) -> Quotas:
        """What each principal may have."""
        return Quotas(
            self.max_sessions_per_principal,
            self.max_stored_mib_per_principal,
            self.max_steps_per_s_per_principal,
            self.max_queued_steps_per_principal,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (which pydantic-settings puts first), then the environment, then the file."""
        return init_settings, env_settings, _StandardVariables(settings_cls), _ConfigFile(settings_cls)


def _names(listed: str | None) -> list[str]:
    return [name for name in (each.strip() for each in (listed or "").split(",")) if name]


class _StandardVariables(PydanticBaseSettingsSource):
    """What OpenTelemetry's own variables say; those that begin with NTM_SERVER_ go before them."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The value of one setting, which is never read as JSON."""
        named = os.environ.get(OTLP_ENDPOINT_VARIABLE) if field_name == "otlp_endpoint" else None
        return named or None, field_name, False

    def __call__(self) -> dict[str, Any]:
        value, name, _ = self.get_field_value(
            self.settings_cls.model_fields["otlp_endpoint"], "otlp_endpoint"
        )
        return {} if value is None else {name: value}


class _ConfigFile(TomlConfigSettingsSource):
    """The file that the flag or the environment variable `config` names, if any does."""

    def __call__(self) -> dict[str, object]:
        named = self.current_state.get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
        if not named:
            return {}
        path = Path(str(named))
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot read the settings file {path}: {error}") from error


class SettingsError(Exception):
    """Settings that cannot be used."""


def check_environment() -> None:
    """Refuse an environment variable that looks like a setting and is none, as a misspelt flag is refused.

    Raises:
        SettingsError: there is one.
    """
    known = {f"{ENV_PREFIX}{name.upper()}" for name in ServerSettings.model_fields}
    unknown = sorted(
        name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in known
    )
    if unknown:
        raise SettingsError(
            f"unknown settings in the environment: {', '.join(unknown)}; see --help for all there are"
        )
