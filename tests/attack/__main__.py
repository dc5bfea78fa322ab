"""`python -m tests.attack`: what one caller can do to the others, tried on a real server; bounded at 15 minutes.

Each attack runs for some seconds in a process of its own, beside neighbours who call at a fixed rate and hold every
answer against what it must be, bit for bit. A row passes if they keep 80 % of their goodput, nothing they get is wrong,
and the server's threads and health are as before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from server.security.tokens import line_of
from tests.attack import trial


def main() -> int:
    """Returns the exit status: 0 if no attack has harmed the neighbours."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each attack (8)")
    parser.add_argument("--only", default="", help="attacks with this in their name")
    parser.add_argument("--transport", default="auto", choices=["auto", "native", "grpcio"])
    options = parser.parse_args()
    rows = []
    print(trial.HEAD, flush=True)
    for attacks, with_tokens in ((trial.ATTACKS, False), (trial.WITH_TOKENS, True)):
        chosen = [name for name in attacks if options.only in name]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as directory:
            flags = ["--transport", options.transport]
            if with_tokens:
                tokens = Path(directory) / "tokens"
                tokens.write_text("\n".join(line_of(name, token) for name, token in trial.TOKENS.items()))
                flags += ["--tokens", str(tokens)]
            server = trial.Server(Path(directory) / "server", *flags)
            try:
                with trial.neighbours_of(
                    server.address, trial.TOKENS["neighbour"] if with_tokens else ""
                ) as neighbours:
                    for name in chosen:
                        rows.append(trial.try_out(name, server, neighbours, options.seconds))
                        print(trial.line(rows[-1]), flush=True)
            finally:
                server.stop()
    failed = []
    if options.only in "overload":
        print(f"\n{trial.OVERLOAD_HEAD}", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            flags = ["--transport", options.transport]
            for line, is_good in trial.try_overload(Path(directory) / "server", flags, options.seconds):
                print(line, flush=True)
                failed += [] if is_good else ["overload"]
    harmed = failed + [row.name for row in rows if not row.has_passed]
    print(f"\n{len(rows)} attacks, {len(harmed)} harmed the neighbours: {', '.join(harmed) or 'none'}")
    return 1 if harmed else 0


if __name__ == "__main__":
    sys.exit(main())
