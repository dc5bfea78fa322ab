"""Namespaces: each principal's session ids and request ids are its own.

Inside the server a session goes by a key: its owner's name, then the id that the owner gave it. Two owners may use one
id without meeting, and one that asks for another's session asks for a key that nobody has. So the sessions of others do
not exist for a caller, in whatever rpc, store or replica, and nothing has to be hidden. Where nobody is told apart, and
for the owner of the sessions that were there before, the key is the bare id.

A key reads `+OWNER/ID`, the owner percent-encoded; neither sign can stand in an id. `+` sorts before everything that an
id can begin with, so the sessions of one owner lie together in every store.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

_MARK = "+"
_AFTER_ALL_MARKED = ","
"""Sorts after every key with an owner, and before every bare id."""
_AFTER_ALL = "\x7f"
"""Sorts after every id."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """The keys of one owner's sessions, or with `EVERYBODY` those of all."""

    prefix: str
    """What a key begins with; "" for bare ids."""
    is_everybodys: bool = False

    @staticmethod
    def of(owner: str) -> Namespace:
        """The namespace of an owner by name; bare ids for ""."""
        return Namespace(f"{_MARK}{quote(owner, safe='')}/") if owner else BARE

    def key(self, session_id: str) -> str:
        """The key of one of its sessions, or the beginning of one for ""; whatever stands there for an id."""
        if self.prefix or not session_id.startswith(_MARK):
            return self.prefix + session_id
        return f"{_MARK}/{session_id}"  # looks like somebody's key, and becomes one that nobody has

    def request_key(self, request_id: str) -> str:
        """The key of a request; a request without an id has none."""
        return self.prefix + request_id if request_id else ""

    def first(self, after: str) -> str:
        """What all keys after the id `after` sort after; all of its keys for ""."""
        if self.is_everybodys:
            return after
        return self.prefix + after if self.prefix or after else _AFTER_ALL_MARKED

    def holds(self, key: str) -> bool:
        """Whether a key is of one of its sessions."""
        if self.is_everybodys:
            return True
        return key.startswith(self.prefix) if self.prefix else not key.startswith(_MARK)

    @property
    def range(self) -> tuple[str, str]:
        """What its keys do not sort before, and what they all sort before."""
        if self.prefix:
            return self.prefix, self.prefix[:-1] + chr(ord(self.prefix[-1]) + 1)
        return ("" if self.is_everybodys else _AFTER_ALL_MARKED), _AFTER_ALL

    def shown(self, key: str) -> str:
        """What a caller within it is shown for a key: the id."""
        return key if self.is_everybodys else key.removeprefix(self.prefix)


BARE = Namespace("")
EVERYBODY = Namespace("", is_everybodys=True)


def split_key(key: str) -> tuple[str, str]:
    """The owner and the id that a key stands for; the owner of a bare id is ""."""
    if not key.startswith(_MARK):
        return "", key
    owner, _, session_id = key[len(_MARK) :].rpartition("/")
    return unquote(owner), session_id
