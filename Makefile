# Thin: CMake builds (CMakePresets.json), ctest tests, scripts/ install and fetch.
#
#   make            build/bin/heed
#   make run        a real model reads a real book under four mechanisms: build/report.html
#                   MODEL=smollm2|gemma3, TOKENS=n
#   make test       everything that takes minutes; test-full adds every golden row
#   make python     the build with the Python package in build/python and torch operators
#   make bench      what the machine can do, and how much of it the kernels reach
#   make bars       every planner's time against the bound it must meet: minutes on a quiet machine
#   make performance  docs/performance.md: the same and more beside other programs; some twelve minutes, alone
#   make lint       format, warnings, clang-tidy; make format rewrites the sources
#   make docs       docs/systems.md, from what the command says of its mechanisms
#   make sanitize   the tests under the address and undefined-behaviour sanitizers
#   make fuzz       every fuzzer for FUZZ_SECONDS
#   make install    PREFIX=/usr/local, DESTDIR
#   make clean      removes what was built; not .venv, not the models in the cache
SHELL := /bin/bash
.DEFAULT_GOAL := build

CACHE := $(or $(HEED_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/heed)
FILE_smollm2 := smollm2-135m-instruct-q4_1.gguf
FILE_gemma3 := gemma-3-270m-q4_k_m.gguf
TOKENS_smollm2 := 8000
TOKENS_gemma3 := 32000

MODEL ?= smollm2
TOKENS ?= $(TOKENS_$(MODEL))
MECHANISMS := dense streaming:sink=4,window=512 moba:block=64,top_k=8,sink=64 power:block=64
FUZZERS := gguf safetensors tokenizer
FUZZ_SECONDS ?= 60
PREFIX ?= /usr/local
SOURCES = $(shell find $(wildcard heed cli python tests examples bench) -name "*.h" -o -name "*.cpp")

.PHONY: build
build:
	@scripts/deps.sh
	@test -f build/build.ninja || cmake --preset release
	cmake --build --preset release

# The build with the Python package and torch operators, whose tests are among all tests.
.PHONY: python
python:
	@scripts/deps.sh build python
	cmake --preset release
	cmake --build --preset release

.PHONY: check-model
check-model:
	@test -n "$(FILE_$(MODEL))" || { echo "MODEL = $(MODEL), expected smollm2 or gemma3" >&2; exit 2; }

.PHONY: run
run: check-model build
	@scripts/fetch.sh $(MODEL) bible
	build/bin/heed compare "$(CACHE)/$(FILE_$(MODEL))" --file "$(CACHE)/bible-kjv.txt" --tokens $(TOKENS) \
	  $(MECHANISMS:%=--mechanism %) --task perplexity,passkey --passkey-length 4000 --html build/report.html

.PHONY: test
test: python
	@scripts/fetch.sh
	ctest --preset release --no-tests=error

.PHONY: test-full
test-full: python
	@scripts/fetch.sh
	ctest --preset full --no-tests=error

.PHONY: bench
bench: build
	build/bin/heed bench peak
	build/bin/heed bench attend

.PHONY: bars
bars: build
	scripts/bars.py --json build/bars.json

.PHONY: performance
performance: build
	@scripts/fetch.sh smollm2 gemma3
	@scripts/deps.sh peers
	scripts/performance.py measure
	scripts/performance.py render

# The kernels' intrinsics and torch's headers are not clang-tidy's business; the compiler's warnings cover them.
.PHONY: lint
lint:
	@scripts/deps.sh build lint
	clang-format-19 --dry-run -Werror $(SOURCES)
	@test -f build-lint/build.ninja || cmake --preset lint
	cmake --build --preset lint
	find heed cli -name '*.cpp' -not -path '*/isa/*' -not -path '*/torch/*' -not -path '*/nn/*' -print0 | \
	  xargs -0 -P "$$(nproc)" -n 4 clang-tidy-19 --quiet -p build-lint --extra-arg=-Wno-unknown-warning-option

.PHONY: format
format:
	@scripts/deps.sh lint
	clang-format-19 -i $(SOURCES)

.PHONY: docs
docs: build
	scripts/docs.sh build/bin/heed

.PHONY: sanitize
sanitize:
	@scripts/deps.sh build
	@scripts/fetch.sh
	@test -f build-sanitize/build.ninja || cmake --preset sanitize
	cmake --build --preset sanitize
	ctest --preset sanitize --no-tests=error
	build-sanitize/bin/heed compare "$(CACHE)/$(FILE_smollm2)" --file "$(CACHE)/bible-kjv.txt" --tokens 600 \
	  $(MECHANISMS:%=--mechanism %) --html build-sanitize/report.html

# What a fuzzer finds stays in build-fuzz; a finding that was fixed goes to tests/fuzz/corpus, which the tests replay.
.PHONY: fuzz
fuzz:
	@scripts/deps.sh build fuzz
	@test -f build-fuzz/build.ninja || cmake --preset fuzz
	cmake --build --preset fuzz
	@set -e; for name in $(FUZZERS); do \
	  mkdir -p build-fuzz/corpus/$$name && \
	  echo "fuzz_$$name for $(FUZZ_SECONDS) s" && \
	  { build-fuzz/bin/fuzz_$$name -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 \
	      -artifact_prefix=build-fuzz/found_ build-fuzz/corpus/$$name tests/fuzz/corpus/$$name > build-fuzz/$$name.log 2>&1 || \
	    { tail -n 60 build-fuzz/$$name.log; exit 1; }; } && \
	  grep -E 'executed_units|peak_rss' build-fuzz/$$name.log; \
	done

.PHONY: install
install: build
	cmake --install build --prefix "$(PREFIX)"

.PHONY: clean
clean:
	rm -rf build build-lint build-sanitize build-fuzz
