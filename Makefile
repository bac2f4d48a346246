# make run    creates .venv, installs, and takes DeepSeek-V3's config from plan to checked execution
# make test   creates .venv, installs, and runs the whole suite, but for what needs a serving runtime
# make runtimes   the tests in vLLM, SGLang, TokenSpeed and transformers, each in an environment that is kept
# TORCH names the torch to install (a CPU build is enough); VENV the environment; WORKERS the test processes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
MODEL ?= deepseek-v3
TOOL = $(VENV)/bin/kernel-registry

.PHONY: install run test runtimes lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[kernels,test]"
	touch $@

run: install
	$(TOOL) plan $(MODEL) --platform host --platform sm_90 --platform sm_100 --platform gfx942 --platform gfx950
	$(TOOL) run $(MODEL)
	TRITON_INTERPRET=1 $(TOOL) run $(MODEL)

test: install
	$(VENV)/bin/python -m pytest -n $(WORKERS)

runtimes: install
	TORCH="$(TORCH)" WORKERS="$(WORKERS)" $(VENV)/bin/nox -f tests/integrations/noxfile.py

lint: install
	$(VENV)/bin/ruff check .
	$(TOOL) lint

clean:
	rm -rf $(VENV) build *.egg-info
