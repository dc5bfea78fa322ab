#!/bin/sh
# Makes the secrets that docker-compose.yml mounts, and that the Kubernetes example is given: passwords, a token for clients,
# and an authority of this installation's own with a certificate for each part. What is there stays. Certificates with
# less than 30 days left are replaced, which parts that run notice by themselves.
set -eu
umask 022
directory=${NTM_SECRETS:-deploy/secrets}
renew_before_s=$((30 * 24 * 3600))

# Nobody else can enter the directory; in it, users of containers can read what is mounted for them.
install -d -m 700 "$directory"
cd "$directory"

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

for name in valkey_password grafana_password inspector_token; do
    [ -s "$name" ] || random > "$name"
done

# A token for clients, and the file that says whose it is: that one holds hashes, and goes to the servers.
if [ ! -s tokens ]; then
    random > token
    printf 'operator sha256:%s\n' "$(openssl dgst -sha256 -r token | cut -d ' ' -f 1)" > tokens
fi

if [ ! -s authority.pem ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -subj "/CN=NTM local authority" \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout authority.key -out authority.pem 2> /dev/null
    chmod 600 authority.key
fi

# A part's certificate: its name, and the names and addresses that it is reached by.
issue() {
    name=$1 reached_by=$2
    install -d -m 755 "tls/$name"
    if openssl x509 -in "tls/$name/certificate.pem" -noout -checkend "$renew_before_s" > /dev/null 2>&1; then
        return
    fi
    temporary=$(mktemp -d "tls/$name/.new.XXXXXX")
    printf 'basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=%s\n' \
        "$reached_by" > "$temporary/extensions"
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=$name" \
        -keyout "$temporary/key.pem" -out "$temporary/request" 2> /dev/null
    openssl x509 -req -in "$temporary/request" -CA authority.pem -CAkey authority.key -days 365 -sha256 \
        -extfile "$temporary/extensions" -out "$temporary/certificate.pem" 2> /dev/null
    cp authority.pem "$temporary/authority.pem"
    chmod 644 "$temporary"/*.pem
    # Moved, not written over: nobody reads half a file, and the router looks for moves.
    for file in authority.pem key.pem certificate.pem; do
        mv "$temporary/$file" "tls/$name/$file"
    done
    rm -r "$temporary"
}

issue server DNS:server,DNS:replica,DNS:replica.ntm.svc,DNS:localhost,IP:127.0.0.1
issue router DNS:router,DNS:ntm,DNS:ntm.ntm.svc,DNS:localhost,IP:127.0.0.1
issue valkey DNS:valkey,DNS:localhost,IP:127.0.0.1
issue prometheus DNS:prometheus,DNS:localhost,IP:127.0.0.1
