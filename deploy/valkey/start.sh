#!/bin/sh
# Starts Valkey with the password of the secret file: not in its arguments, not in its environment.
set -eu
password_file=/run/secrets/valkey_password
if [ ! -s "$password_file" ]; then
    echo "the secret $password_file is missing or empty: make secrets writes deploy/secrets/valkey_password" >&2
    exit 1
fi
exec valkey-server /etc/valkey/valkey.conf - <<CONFIG
requirepass $(cat "$password_file")
CONFIG
