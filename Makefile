# portpool: `make help` lists the targets.

POOL ?= examples/echo.yaml

.PHONY: all help run check test openapi e2e e2e-kind cluster cluster-down lint generate image tools tools-present scale-operator robustness bench bench-tools bench-publish soak

all: lint test

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

run:  ## Build portpool (quickly, less optimized) and run a pool on this machine (POOL=examples/echo.yaml)
	cargo build --profile quick --locked
	@echo "In another terminal: target/quick/portpool connect 127.0.0.1:7700"
	target/quick/portpool local -f $(POOL)

check:  ## Format, lint, unit and data-plane tests, in a few minutes: needs no root, Go or network
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo test --locked --workspace --lib --bins
	cargo test --locked --test it -- --skip operator:: --skip chart:: --skip local:: --skip handover:: --skip pool:: --skip manifest::odd

test:  ## Every test: examples with their real programs, the controller with a real API server
	@echo "Needs the programs of make tools, Go, Python, and the network once. On 2 cores: about 10 minutes to build,"
	@echo "5 more for the API server the first time, and 17 to run. make check is shorter and needs none of them."
	@$(MAKE) --no-print-directory tools-present
	KUBEBUILDER_ASSETS=$$(tools/control-plane) && export KUBEBUILDER_ASSETS && cargo test --locked --workspace
	@$(MAKE) --no-print-directory openapi

openapi:  ## The API against its OpenAPI document: two validators and schemathesis (Python, Go, network once)
	PORTPOOL_OPENAPI=$$(tools/openapi) && export PORTPOOL_OPENAPI && cargo test --locked --test it openapi:: -- --ignored

e2e: tools-present  ## Tests on a real Kubernetes node on this machine (root, no Docker), which they remove again
	tools/e2e tools/cluster

e2e-kind: tools-present  ## The same tests on kind, which needs Docker
	tools/e2e tools/kind-cluster

cluster: tools-present  ## A real one-node Kubernetes on this machine (root, no Docker) with portpool's image
	tools/cluster up >/dev/null
	tools/image && tools/example-images && tools/cluster load target/image/*.tar
	@tools/cluster up

cluster-down:  ## Stop the node of make cluster and remove everything it made
	tools/cluster down

lint:  ## Formatting, clippy, documentation, scripts, and the licences and sources of dependencies
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
	@if command -v shellcheck >/dev/null; then shellcheck --severity=warning .ci/run $$(grep -slE '^#!.*bash' tools/*); \
	else echo "shellcheck is not installed, scripts are not checked: apt-get install shellcheck"; fi
# The advisories need a database from the network: .github/workflows/advisories.yml checks them.
	deny=$$(tools/cargo-deny) && $$deny --log-level error --locked --all-features check bans licenses sources

scale-operator:  ## Measure the controller: a pool of 1000 beside a ReplicaSet, and 200 pools
	KUBEBUILDER_ASSETS=$$(tools/control-plane) && export KUBEBUILDER_ASSETS && \
	cargo test --release --locked --test it operator::scale -- --ignored --nocapture --test-threads=1

# Each variable of make bench is an option of portpool-bench.
BENCH_OPTIONS = \
  $(if $(MEASURES),--measures $(MEASURES)) \
  $(if $(LANES),--lanes $(LANES)) \
  $(if $(ROUNDS),--rounds $(ROUNDS)) \
  $(if $(SECONDS),--seconds $(SECONDS)) \
  $(if $(BOTH_CORES),--both-cores $(BOTH_CORES)) \
  $(if $(BASE),--base $(BASE)) \
  $(if $(BUSY),--busy) \
  --portpool $(or $(PORTPOOL),target/release/portpool)

bench: bench-tools  ## Measure beside HAProxy and nginx (MEASURES=bulk_1,message LANES=portpool,nginx ROUNDS=5 BASE=other/portpool)
	cargo build --release --locked -p portpool -p portpool-bench
	target/release/portpool-bench $(BENCH_OPTIONS)

bench-publish:  ## Put the last complete run of make bench into docs/bench
	target/release/portpool-bench --publish docs/bench

soak:  ## Run a pool under churn and faults, check every byte, watch memory (MINUTES=30)
	cargo build --release --locked -p portpool -p portpool-bench
	target/release/portpool-soak --minutes $(or $(MINUTES),30) --portpool $(or $(PORTPOOL),target/release/portpool)

generate:  ## Rewrite generated files: protocol code, OpenAPI document, CRD, install.yaml, chart README
	KUBEBUILDER_ASSETS=$$(tools/control-plane) && export KUBEBUILDER_ASSETS && \
	BLESS=1 cargo test --locked --test it -- generated operator::fields::every_field

image:  ## Build a static image archive without Docker, target/image/portpool.tar (IMAGE=name:tag)
	tools/image

# The programs that make test needs (or files of theirs), and after a colon their Debian packages with other names.
TOOLS = iperf3 redis-server psql:postgresql-client /usr/lib/postgresql/*/bin/initdb:postgresql \
  /usr/games/teeworlds-server:teeworlds-server Xvfb:xvfb x11vnc in.tftpd:tftpd-hpa curl \
  vsftpd lftp ffmpeg sipp:sip-tester /usr/games/openttd:openttd \
  /usr/share/games/openttd/baseset/opengfx*:openttd-opengfx /usr/lib/python3/dist-packages/ipykernel:python3-ipykernel \
  nc:netcat-openbsd wget perl node:nodejs javac:default-jdk-headless
# Debian's daemons are in /usr/sbin, which the PATH of a user other than root may lack.
MISSING = PATH=$$PATH:/usr/sbin; for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || [ -e $${tool%%:*} ] || echo $${tool\#\#*:}; done

tools:  ## Install the programs that make test needs, as root on Debian
	@missing=$$($(MISSING)); \
	[ -z "$$missing" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; }

# Names what is missing and installs nothing.
tools-present:
	@missing=$$(echo $$($(MISSING))); \
	[ -z "$$missing" ] || { echo "missing: $$missing. Install with: sudo apt-get install $$missing (or: sudo make tools)" >&2; exit 1; }

robustness:  ## Run tests/robustness against portpool, HAProxy and nginx; writes docs/robustness.md
	tools/robustness

bench-tools:  ## Install the benchmark's rivals, as root on Debian; elsewhere name them
	@if command -v haproxy >/dev/null && [ -e /usr/lib/nginx/modules/ngx_stream_module.so ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends haproxy nginx libnginx-mod-stream; \
	else echo "the benchmark needs its rivals: sudo apt-get install haproxy nginx libnginx-mod-stream" >&2; exit 1; fi
