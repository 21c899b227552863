# What can be done with es-proxy. `make help` lists it; nothing of it is needed to run es_proxy.py.

PYTHON  ?= python3
VENV    ?= .venv
PREFIX  ?= /usr/local
DESTDIR ?=
SECONDS ?= 300
CLIENTS ?= 50
ONCE    ?=
ARGS    ?=
SOURCES  = es_proxy.py mock_es.py $(wildcard test_*.py bench/*.py)
BIN      = $(VENV)/bin
# Test tools and the official clients the tests drive; es_proxy.py itself needs none of them.
PACKAGES = "pytest>=8" "coverage>=7.10" ruff mypy trustme h11 elasticsearch8 elasticsearch9 opensearch-py noida-db

.PHONY: help demo run test test-functional test-memory test-stress test-torture fuzz coverage lint bench install uninstall build deps clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) SECONDS=$(SECONDS) CLIENTS=$(CLIENTS)"

demo:  ## the proxy before a stand-in Elasticsearch: requests, records; until Ctrl-C (ONCE=1: ends by itself)
	$(PYTHON) mock_es.py --demo $(if $(ONCE),--once)

run:  ## run the proxy: make run ARGS="127.0.0.1 9201 127.0.0.1 9200 --no-tls"
	$(PYTHON) es_proxy.py $(ARGS)

deps: $(VENV)/.done  ## a virtual environment with the test tools, in $(VENV)

$(VENV)/.done: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PACKAGES)
	touch $@

test: deps  ## all tests (a 20-second stress run among them) and the coverage of es_proxy.py, at least 95 %
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	-$(BIN)/coverage combine --quiet  # processes that were killed on purpose leave torn data: those are left out
	$(BIN)/coverage report --fail-under=95

test-functional: deps  ## functional and protocol tests only
	$(BIN)/python -m pytest test_es_proxy.py test_protocol.py test_redaction.py

test-memory: deps  ## large bodies in small memory, and no growth
	$(BIN)/python -m pytest test_stress.py -k memory

test-stress: deps  ## load through the proxy: make test-stress SECONDS=300 CLIENTS=50
	$(BIN)/python test_stress.py --seconds $(SECONDS) --clients $(CLIENTS)

test-torture: deps  ## kill -9, full disks, rotation and large bodies at once, then the invariants: SECONDS=300
	$(BIN)/python test_audit.py --torture $(SECONDS)

fuzz: deps  ## mutated requests and responses against the parser and an independent one: make fuzz SECONDS=60
	$(BIN)/python test_protocol.py --fuzz $(SECONDS)

coverage: test  ## the same as test, and the lines that were not reached as a page in build/coverage
	$(BIN)/coverage html --quiet --directory build/coverage

lint: deps  ## ruff and mypy --strict
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

bench:  ## speed side by side with nginx, HAProxy, mitmproxy; says what is missing and leaves that out
	$(PYTHON) bench/bench.py $(ARGS)

build: build/es-proxy  ## the executable build/es-proxy

build/es-proxy: es_proxy.py
	mkdir -p build
	install -m 755 es_proxy.py $@

install: build  ## es-proxy into PREFIX/bin and the systemd unit; honours DESTDIR
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -m 755 build/es-proxy $(DESTDIR)$(PREFIX)/bin/es-proxy
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' es-proxy.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/es-proxy.service
	chmod 644 $(DESTDIR)$(PREFIX)/lib/systemd/system/es-proxy.service

uninstall:  ## take both away again
	rm -f $(DESTDIR)$(PREFIX)/bin/es-proxy $(DESTDIR)$(PREFIX)/lib/systemd/system/es-proxy.service

clean:  ## everything that was made here
	rm -rf build .venv .venv-* .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache __pycache__ bench/__pycache__
