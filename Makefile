# Two commands do it: `make demo` shows the main job on a real guest, `make test` proves it.
# Everything is built once, optimised, for both: guests under software emulation need it.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# The default guest is built once, whatever is run.
export OFFSHOOT_CACHE ?= $(abspath $(TARGET))/guest

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-full fuzz check bench

help: ## Say what there is.
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Install the Debian packages that are missing (as root).
	@scripts/setup

build: setup ## Build `offshoot`, the resident library inside it, and the benchmarks.
	$(CARGO) build --release --package offshoot --package bench

demo: build ## Fork a running Debian eight times and show that it worked; KEEP=1 leaves all running.
	$(TARGET)/release/offshoot-bench demo

check: setup ## Format, lints, licences and house rules.
	@scripts/check

test: check ## Checks, unit and integration tests, real guests.
	@scripts/run-tests

test-full: check ## The same, longer: more rounds, more seeds, more kills.
	@OFFSHOOT_TEST_FULL=1 scripts/run-tests

fuzz: setup ## Every decoder against edited bytes, FUZZ_SECONDS (60) for each.
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-60} $(CARGO) test --release --workspace --lib -- fuzz:: --nocapture --test-threads 1

bench: bench-fork bench-store bench-prefetch ## All benchmarks; `make bench-NAME` runs one, results in target/bench/NAME.json; bench-prefetch-full has more servers.

bench-%: build
	$(TARGET)/release/offshoot-bench $*
