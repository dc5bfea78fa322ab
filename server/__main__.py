"""`python -m server`: read the settings, set up the log, serve until told to stop; or `describe` a model file.

`python -m server check-config`, with the same flags, environment and file, says whether a server could start with them:
it reads settings, certificates, tokens, keys and models, and touches neither ports nor the store.
"""

from __future__ import annotations

import sys

import uvloop
from pydantic import ValidationError
from pydantic_settings import CliApp

from server import log
from server.describe_command import describe
from server.errors import StartupError
from server.launch import run
from server.model import repository
from server.rpc.tracing import check_is_installed
from server.settings import ServerSettings, SettingsError, check_environment


def main() -> int:
    """Serve; returns the exit status: 0 after a stop in good order, 1 for a start that failed, 2 for wrong settings."""
    if sys.argv[1:2] == ["describe"]:
        return describe(sys.argv[2:])
    try:
        check_environment()
        arguments = sys.argv[1:]
        only_checks = arguments[:1] == ["check-config"]
        settings = CliApp.run(ServerSettings, cli_args=arguments[only_checks:])
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"])).replace("_", "-")
            print(f"{'--' if name else ''}{name}: {problem['msg']}".lstrip(": "), file=sys.stderr)
        return 2
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    log.set_up(settings.log_format)
    try:
        if only_checks:
            return _check(settings)
        uvloop.run(run(settings))
    except StartupError as error:
        print(f"the server does not start: {error}", file=sys.stderr)
        return 1
    return 0


def _check(settings: ServerSettings) -> int:
    """Read all that a start would read.

    Raises:
        StartupError: something of it cannot be used.
    """
    settings.authenticator()
    settings.tls_identity()
    if settings.otlp_endpoint is not None:
        check_is_installed()
    skips = settings.model_errors == "skip"
    models = repository.load_all(
        settings.models, (lambda _, error: print(f"skipped: {error}", file=sys.stderr)) if skips else None
    )
    print(f"these settings can be used, with {', '.join(sorted(model.label for model in models.values()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
