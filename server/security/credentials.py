"""Credentials: the certificate that the server shows, and the authorities whose clients it lets in.

The files are looked at when a client connects, and read again when they have changed, so that a certificate is
replaced without a restart. New files that do not fit together are reported once, and those before stay in use.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from server.errors import SecurityFileError
from server.security.watched_files import WatchedFiles

log = structlog.get_logger()


CERTIFICATE_ERRORS = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for bytes that are no certificate, or none of a kind that it knows."""


@dataclass(frozen=True)
class TlsFiles:
    """Where the server's certificates lie, as PEM."""

    certificate: Path
    """The server's certificate, and those between it and its authority after it."""
    key: Path
    """Its private key, without a password."""
    client_authorities: Path | None = None
    """Authorities of clients' certificates: with them every client must show one."""

    def watch(self) -> WatchedFiles:
        """The files, to be read again when they change."""
        paths = [self.certificate, self.key]
        return WatchedFiles(paths if self.client_authorities is None else [*paths, self.client_authorities])


@dataclass(frozen=True)
class _Pair:
    certificate: bytes
    key: bytes
    client_authorities: bytes | None
    not_after: datetime


class TlsIdentity:
    """The server's certificate, as it is now."""

    def __init__(self, files: TlsFiles, watched: WatchedFiles | None = None) -> None:
        """Read the files.

        Args:
            files: where they lie.
            watched: the same files, with another pause between two looks.

        Raises:
            SecurityFileError: they cannot be used.
        """
        self._files = files
        self._watched = watched or files.watch()
        self._pair = _check(files, self._watched.read())
        self._context: tuple[_Pair, ssl.SSLContext] | None = None
        _warn_of_end(files, self._pair)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a gRPC port that shows the certificate as it is when a client connects."""
        shown = self._pair

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # gRPC calls this in a thread of its own before each handshake; None says that nothing is new.
            nonlocal shown
            try:
                self._renew()
            except Exception as error:  # gRPC would refuse the client for it
                log.error("the certificate could not be looked at", problem=repr(error))
            if self._pair is shown:
                return None
            shown = self._pair
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            fetch,  # type: ignore[arg-type]  # the stubs leave None out
            require_client_authentication=self._files.client_authorities is not None,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For a connection of another protocol: the certificate as it is now."""
        self._renew()
        if self._context is None or self._context[0] is not self._pair:
            self._context = self._pair, self._new_context()
        return self._context[1]

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._files.certificate, self._files.key)
        except (OSError, ssl.SSLError) as error:  # replaced since they were read
            raise SecurityFileError(str(self._files.certificate), str(error)) from error
        if self._pair.client_authorities is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=self._pair.client_authorities.decode())
        return context

    def _renew(self) -> None:
        """Read the files again if they have changed."""
        if not self._watched.have_changed():
            return
        try:
            self._pair = _check(self._files, self._watched.read())
        except SecurityFileError as error:
            log.error("the certificate before stays in use", problem=str(error))
            return
        log.info("certificate replaced", not_after=self._pair.not_after.isoformat())
        _warn_of_end(self._files, self._pair)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = self._pair
        return grpc.ssl_server_certificate_configuration(
            [(pair.key, pair.certificate)], root_certificates=pair.client_authorities
        )


def _check(files: TlsFiles, contents: list[bytes]) -> _Pair:
    certificate, key, *authorities = contents
    public = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        first = x509.load_pem_x509_certificates(certificate)[0]
        its_key = first.public_key().public_bytes(*public)
    except CERTIFICATE_ERRORS as error:
        raise SecurityFileError(str(files.certificate), "it holds no certificate as PEM") from error
    try:
        private_key = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise SecurityFileError(
            str(files.key), "it holds no private key as PEM without a password"
        ) from error
    if private_key.public_key().public_bytes(*public) != its_key:
        raise SecurityFileError(
            str(files.key), f"it is not the key of the certificate in {files.certificate}"
        )
    if authorities:
        try:
            x509.load_pem_x509_certificates(authorities[0])
        except CERTIFICATE_ERRORS as error:
            raise SecurityFileError(
                str(files.client_authorities), "it holds no certificates as PEM"
            ) from error
    return _Pair(certificate, key, authorities[0] if authorities else None, first.not_valid_after_utc)


def _warn_of_end(files: TlsFiles, pair: _Pair) -> None:
    if pair.not_after <= datetime.now(UTC):
        log.error(
            "the certificate has ended, and clients will refuse it: replace it",
            file=str(files.certificate),
            not_after=pair.not_after.isoformat(),
        )
