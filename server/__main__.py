"""`python -m server`: read the settings, set up the log, serve until told to stop; or `describe` a model file."""

from __future__ import annotations

import logging
import sys

import structlog
import uvloop
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.describe_command import describe
from server.errors import StartupError
from server.launch import run
from server.settings import ServerSettings, SettingsError, check_environment


def main() -> int:
    """Serve; returns the exit status: 0 after a stop in good order, 1 for a start that failed, 2 for wrong settings."""
    if sys.argv[1:2] == ["describe"]:
        return describe(sys.argv[2:])
    try:
        check_environment()
        settings = CliApp.run(ServerSettings, cli_args=sys.argv[1:])
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"])).replace("_", "-")
            print(f"{'--' if name else ''}{name}: {problem['msg']}".lstrip(": "), file=sys.stderr)
        return 2
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    _set_up_log(settings.log_format)
    try:
        uvloop.run(run(settings))
    except StartupError as error:
        print(f"the server does not start: {error}", file=sys.stderr)
        return 1
    return 0


def _set_up_log(log_format: str) -> None:
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks
            if log_format == "json"
            else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    sys.exit(main())
