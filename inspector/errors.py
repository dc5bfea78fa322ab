"""What a request of the page can fail with, beside what the server answers (`ClientError`).

InspectorError
├── BadRequestError      400: what was sent makes no sense; say something else
├── NotFoundError        404: there is no such thing to show
├── TooLargeError        413: more than the inspector takes
└── SettingsError        the process does not start: its settings do not fit together
"""

from __future__ import annotations


class InspectorError(Exception):
    """A request failed, or a start; the message is for the person who looks at the page or typed the command."""

    http_status = 500


class BadRequestError(InspectorError):
    """What was sent makes no sense here."""

    http_status = 400


class NotFoundError(InspectorError):
    """There is no such thing to show."""

    http_status = 404


class TooLargeError(InspectorError):
    """More than the inspector takes at once."""

    http_status = 413


class SettingsError(InspectorError):
    """Settings that cannot be used together."""
