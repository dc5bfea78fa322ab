"""`audit.py PIP_AUDIT FILE...`: known vulnerabilities of the versions that are pinned, by the index's advisories.

Exits with 1 if there are any. A version for which the index has no advisories to ask, or an index that cannot be
reached, is no clean version: it exits with 3 and names what was not looked at; with --or-say-so it says so and exits
with 0, for `make check` on a machine without a way out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

UNAUDITED = 3


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="audit.py", description=__doc__)
    parser.add_argument(
        "--or-say-so", action="store_true", help="what cannot be audited is told and is no failure"
    )
    parser.add_argument("pip_audit", help="the command")
    parser.add_argument("files", nargs="+", help="requirements, each with its version")
    options = parser.parse_args()
    command = [
        options.pip_audit,
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
        "--format",
        "json",
    ]
    for file in options.files:
        command += ["--requirement", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # nosec B603  # pip-audit
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        print(f"NOT AUDITED: the advisories cannot be reached ({reason[:200]})")
        return 0 if options.or_say_so else UNAUDITED
    vulnerable = [each for each in dependencies if each.get("vulns")]
    for each in vulnerable:
        for vulnerability in each["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "none yet"
            print(f"{each['name']} {each['version']}: {vulnerability['id']}, fixed in {fixed}")
    if vulnerable:
        return 1
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    if skipped:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(
            f"NOT AUDITED: {len(skipped)} of {len(dependencies)} versions, of which the index tells nothing: {names}"
        )
        return 0 if options.or_say_so else UNAUDITED
    print(f"{len(dependencies)} versions without a known vulnerability")
    return 0


if __name__ == "__main__":
    sys.exit(main())
