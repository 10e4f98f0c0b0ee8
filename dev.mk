# What developers need, included by the Makefile: set-up, tests, references, checks. `make help-dev` lists it.
READY := $(if $(VENV),$(VENV)/.ready,environment)
EXTRA = $(if $(VENV),$(VENV)/.extra-$1,environment)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST := $(PY) -m pytest
TIDY := $(PY) -m nbconvert --log-level=ERROR --to notebook --inplace \
	--CoalesceStreamsPreprocessor.enabled=True --ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.preserve_cell_metadata_mask='{("tags",), ("cellView",), ("jupyter",)}' \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask='{("language_info", "name"), ("kernelspec",)}'
# A name on make's command line that is none of make's is a mistake: parameters of the notebooks go into ARGS.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
UNKNOWN := $(firstword $(filter-out $(SETTINGS) PIP_% HF_% CUDA_% KILLS KILL_SEED,$(GIVEN)))
$(if $(UNKNOWN),$(error $(UNKNOWN) is no setting of make ($(SETTINGS)). \
	For a parameter of the notebooks: ARGS="-p $(UNKNOWN) $($(UNKNOWN))"))

help-dev: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' dev.mk

# --- set-up
$(or $(VENV),.venv)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or later is needed: PYTHON=python3.11 make setup")'
	@echo "installing the pinned packages into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(PIP) -r requirements.txt
	@touch $@
$(or $(VENV),.venv)/.extra-%: pyproject.toml $(READY)
	@echo "installing what \"$*\" needs into $(@D)"
	@grep -v '^-e' requirements.txt > $(@D)/constraints.txt
	@$(PIP) -c $(@D)/constraints.txt -e ".[$*]"
	@touch $@
environment:
	@$(PY) -c 'import tabletune' 2>/dev/null || \
		{ echo "This environment lacks a package: $(PY) -m pip install -r requirements.txt" >&2; exit 1; }

# --- tests
test test-slow test-peers test-newest test-colab reference: export CUDA_VISIBLE_DEVICES =
test: $(READY) ## the tests that a change must pass, in some minutes
	@$(TABLETUNE) base-models tiny
	@$(PYTEST) -n 2 -m "not (slow or gpu or browser or export or peers)" tests
test-all: test test-slow ## and what is slow by nature: kills, two processes, all kinds of base models
test-slow: base-models ## only what is slow by nature
	@$(PYTEST) -n 2 -m "slow and not export" --durations=10 $(ARGS) tests
test-export: base-models $(call EXTRA,export) $(call EXTRA,chat) $(call EXTRA,browser) ## export and chat, in a browser
	@$(PYTEST) -m export -vv --durations=0 tests
test-gpu: base-models ## what needs an NVIDIA GPU; skipped without one
	@$(PYTEST) -m gpu -rs -vv --durations=0 tests
test-browser: base-models $(call EXTRA,browser) ## press Run All in JupyterLab; needs chromium and chromedriver
	@$(PYTEST) -m browser -x -vv --durations=0 tests
test-peers: base-models $(call EXTRA,peers) ## perplexity beside lm-evaluation-harness
	@HF_HUB_OFFLINE=1 $(PYTEST) -m peers -vv tests
test-newest: .venv-newest/.ready ## the tests with the newest releases of the libraries, in .venv-newest
	@$(call TEST_IN,.venv-newest)
test-colab: .venv-colab/.ready ## the tests with the versions of Colab's newest runtime, in .venv-colab
	@$(call TEST_IN,.venv-colab)
define TEST_IN
@$1/bin/python tests/library_sets.py
$1/bin/python -m tabletune base-models tiny
$1/bin/python -m pytest -n 2 -m "not (slow or gpu or browser or export or peers or pins)" $(ARGS) tests
endef
.venv-newest/.ready .venv-colab/.ready: .venv-%/.ready: requirements.txt tests/library_sets.py
	@echo "installing other versions of the libraries into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(PYTHON) tests/library_sets.py $* > $(@D)/requirements.txt
	@$(PIP_IN) -r $(@D)/requirements.txt
	@$(PIP_IN) --no-deps -e .
	@touch $@
PIP_IN = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check

# --- what is generated
OWN_TABLES := $(patsubst examples/own_tables/%.yaml,example-%,$(wildcard examples/own_tables/*.yaml))
reference: $(READY) ## remake tests/reference after a change of a notebook
	@rm -rf runs/reference
	@$(TABLETUNE) run-all --until 04_evaluate --profile tiny runs/reference
	@cp runs/reference/0*.ipynb tests/reference
	@$(TIDY) tests/reference/*.ipynb
examples: $(READY) example-cpu example-knowledge $(OWN_TABLES) ## remake examples/: the runs of the cpu and knowledge profiles, and other people's tables
example-cpu:
	@rm -rf runs/examples
	@$(TABLETUNE) run-all --profile cpu runs/examples
	@cp runs/examples/0*.ipynb runs/examples/evaluation/* examples/cpu_run
	@$(TIDY) examples/cpu_run/*.ipynb
example-knowledge:
	@rm -rf runs/knowledge_example
	@$(TABLETUNE) run-all --profile knowledge runs/knowledge_example
	@mkdir -p examples/knowledge_run
	@cp runs/knowledge_example/0*.ipynb runs/knowledge_example/evaluation/* examples/knowledge_run
	@$(TABLETUNE) ask runs/knowledge_example --questions src/tabletune/resources/texts/safety_prompts.jsonl > runs/knowledge_example/asked.txt
	@cp runs/knowledge_example/answers.jsonl examples/knowledge_run/safety_prompts.jsonl
	@$(TIDY) examples/knowledge_run/*.ipynb
$(OWN_TABLES): example-%:
	@rm -rf runs/own_tables/$*
	@$(TABLETUNE) run-all --until 01_format_dataset --profile examples/own_tables/$*.yaml runs/own_tables/$*
	@cp runs/own_tables/$*/01_format_dataset.ipynb examples/own_tables/$*.ipynb
	@$(TIDY) examples/own_tables/$*.ipynb
sync: $(READY) ## format notebooks_py/, renew notebooks/ and parameters.json
	@$(PY) -m jupytext --quiet --sync notebooks_py/*.py
	@$(TABLETUNE) sync $(REPO:%=--repository %)
	@$(PY) -m ruff format --quiet
	@$(PY) -m ruff check --quiet --fix
	@$(PY) -m jupytext --quiet --sync notebooks_py/*.py
badges: sync ## write repository (REPO=owner/name), ref and Colab's runtime into README, docs and notebooks
lint: $(READY) ## check format, style and types
	@$(PY) -m ruff format --check --quiet
	@$(PY) -m ruff check --quiet
	@$(PY) -m mypy
docs: $(call EXTRA,docs) ## build the site of docs, executed notebooks and API reference, in .cache/site
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --quiet --strict
	@echo ".cache/site/index.html"
lab: $(call EXTRA,browser) ## open the notebooks in JupyterLab
	@$(PY) -m jupyter lab notebooks

# --- Each command, though a folder or a file may have its name. Any other word is a mistake.
COMMANDS := help run-all $(SERIES) baselines trust export ask index chat rate report compare sweep \
	setup base-models clean help-dev environment test test-all test-slow test-export test-gpu \
	test-browser test-peers test-newest test-colab reference examples example-cpu example-knowledge \
	$(OWN_TABLES) sync badges lint docs lab
.PHONY: $(COMMANDS)
NO_COMMAND := $(firstword $(filter-out $(COMMANDS) $(VENV)/% .venv%,$(MAKECMDGOALS)))
$(if $(NO_COMMAND),$(error $(NO_COMMAND) is no command of make. "make help" lists them))
