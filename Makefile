# The front door. `make help` lists the commands; what they call is `python -m tabletune`.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= $(eval PROFILE := $(shell nvidia-smi --query-gpu=compute_cap,memory.total --format=csv,noheader,nounits 2>&1 \
	| awk -F, '$$1 > 0 && !found { found = $$1 >= 8 && $$2 > 35000 ? "a100" : "t4" } END { print found ? found : "cpu" }'))$(PROFILE)
RUN_DIR ?= runs/$(PROFILE)$(MODEL:%=_%)
GPUS ?= $(or $(shell sed -n 's/^\# GPUS=\([0-9][0-9]*\) .*/\1/p' $(PROFILE_FILE) 2>/dev/null),1)
OUT ?= runs/compare.html
GRID ?= grids/lora.yaml
SWEEP_DIR ?= runs/$(basename $(notdir $(GRID)))_$(PROFILE)$(MODEL:%=_%)
PROFILE_FILE := profiles/$(PROFILE).yaml
TOLD := $(PROFILE_FILE) $(MODEL:%=models/%.yaml)
STAGES := 01_format_dataset 02_finetune_qlora 03_merge_adapter 04_evaluate
# in quotes, as its folder may have a space in its name
PY := "$(if $(VENV),$(VENV)/bin/python,$(PYTHON))"
READY := $(if $(VENV),$(VENV)/.ready,environment)
PIP := -m pip install --quiet --disable-pip-version-check
EXTRAS := .cache/extras
BASE_MODELS := .cache/SmolLM2-135M-Instruct/config.json .cache/tiny-llama/config.json
# what the first stage reads: the base model if it is one of ours, and the table if it is a file here
USED := $(shell cat $(TOLD) 2>/dev/null) $(ARGS)
INPUTS := $(filter $(addsuffix /config.json,$(USED)),$(BASE_MODELS)) \
	$(wildcard $(filter %.csv %.tsv %.json %.jsonl %.parquet %.xlsx %.gz,$(USED)))
# no times of execution, and one line for each progress bar
TIDY := --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True --ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.preserve_cell_metadata_mask='{("tags",)}' \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask='{("language_info", "name"), ("kernelspec",)}'
PAGE := $(PY) -m nbconvert --log-level=ERROR --to html --no-input --template report --TemplateExporter.extra_template_basedirs=src/tabletune/resources/templates
named = $(if $(filter-out 1,$(words $(subst :, ,$($1)))),$(error $1="$($1)": make wants a name without spaces and colons))
$(foreach name,RUN_DIR OUT SWEEP_DIR,$(call named,$(name)))
export PYTHONUTF8 = 1
.PHONY: FORCE $(filter-out %.ipynb %.json,$(MAKECMDGOALS))
test test-slow test-peers reference: export CUDA_VISIBLE_DEVICES =
help: ## show this list
	@awk -F ':.*## ' '/^[a-z$$][a-zA-Z_$$()-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
run-all: 04_evaluate ## run notebooks 1 to 4: PROFILE=t4|a100|cpu|tiny MODEL=name ARGS="-p name value" RUN_DIR=folder GPUS=2
	@$(PY) -m tabletune summary $(RUN_DIR)
$(STAGES): %: $(RUN_DIR)/%.ipynb
$(RUN_DIR)/01_format_dataset.ipynb: $(INPUTS)
$(RUN_DIR)/02_finetune_qlora.ipynb: $(RUN_DIR)/01_format_dataset.ipynb
$(RUN_DIR)/03_merge_adapter.ipynb: $(RUN_DIR)/02_finetune_qlora.ipynb
$(RUN_DIR)/04_evaluate.ipynb: $(RUN_DIR)/03_merge_adapter.ipynb
$(RUN_DIR)/0%.ipynb: notebooks/0%.ipynb $(RUN_DIR)/settings
	@echo "0$*  ($(PROFILE) profile, in $(RUN_DIR))" && exec $(PY) -m tabletune run $< $@ $(if $(filter 2% 4%,$*),--processes $(GPUS))
$(RUN_DIR)/settings: FORCE | $(READY)
	@$(PY) -m tabletune settings $(RUN_DIR) $(TOLD:%=-f %) $(ARGS)
sweep: $(READY) ## run every combination of a grid of parameters: GRID=file.yaml SWEEP_DIR=folder, on top of PROFILE, MODEL, ARGS
	@MAKE="$(MAKE)" exec $(PY) -m tabletune sweep $(GRID) $(SWEEP_DIR) $(TOLD:%=-f %) $(ARGS)
trust: $(READY) ## notebook 6 on a finished run: safety, grounding, memorization, forgetting; RUN_DIR=folder GPUS=2
	@exec $(PY) -m tabletune run notebooks/06_trust.ipynb $(RUN_DIR)/06_trust.ipynb --processes $(GPUS) $(ARGS)
export: $(EXTRAS)/llama-cpp-python-0.3.36 ## notebook 7 on a finished run: model card, GGUF and Ollama files; RUN_DIR=folder
	@exec $(EXTRAS)/bin/python -m tabletune run notebooks/07_export.ipynb $(RUN_DIR)/07_export.ipynb $(ARGS)
report: $(READY) ## write report.html, a page about a run, into RUN_DIR; ARGS="-p price_per_hour 0.5"
	@$(PY) -m tabletune run notebooks/report.ipynb $(RUN_DIR)/report.ipynb $(ARGS) && $(PAGE) $(RUN_DIR)/report.ipynb \
		&& echo "$(RUN_DIR)/report.html"
compare: $(READY) ## write a page with several runs beside each other: RUNS="folder folder" OUT=file.html
	@$(if $(strip $(RUNS)),,echo 'Which runs? make compare RUNS="runs/a runs/b"' >&2; exit 1)
	@mkdir -p $(dir $(OUT)) && $(PY) -m tabletune run notebooks/compare_runs.ipynb $(basename $(OUT)).ipynb -p runs "$(RUNS)"
	@$(PAGE) $(basename $(OUT)).ipynb && echo "$(basename $(OUT)).html"
chat: $(EXTRAS)/gradio-6.20.0 ## a page on which base and fine-tuned model answer you side by side: RUN_DIR=folder
	@$(PY) -m tabletune run notebooks/chat.ipynb $(RUN_DIR)/chat.ipynb --prepare-only -p wait true $(ARGS)
	@$(EXTRAS)/bin/python -m IPython --no-banner --HistoryManager.enabled=False $(RUN_DIR)/chat.ipynb
$(EXTRAS)/bin/python: | $(READY)
	@$(PY) -m venv $(EXTRAS) && $(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth
$(EXTRAS)/gradio-%: $(EXTRAS)/bin/python
	@$< $(PIP) gradio==$* && touch $@
$(EXTRAS)/llama-cpp-python-%: $(EXTRAS)/bin/python
	@echo "compiling llama.cpp, into $(EXTRAS): some minutes, once" && $< $(PIP) llama-cpp-python==$* sentencepiece==0.2.2 && touch $@
setup: $(READY) ## install the pinned packages into .venv; VENV= uses the current environment as it is
$(or $(VENV),.venv)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or later is needed: PYTHON=python3.11 make setup")'
	@echo "installing the pinned packages into $(@D)" && $(PYTHON) -m venv $(@D) && $(@D)/bin/python $(PIP) -r requirements.txt && touch $@
environment:
	@$(PY) -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' torch trl \
		bitsandbytes papermill tabletune || { echo "This environment lacks a package: $(PY) -m pip install -r requirements.txt" >&2; exit 1; }
base-models: $(BASE_MODELS) ## make the base models of the cpu and tiny profiles in .cache
.cache/%/config.json: profiles/base_models.py | $(READY)
	@echo "making the base model $(@D)" && rm -rf $(@D).new && mkdir -p .cache && TQDM_DISABLE=1 $(PY) $< $(if $(filter tiny%,$*),tiny,smollm2) $(@D).new && rm -rf $(@D) && mv $(@D).new $(@D)
test: $(READY) $(lastword $(BASE_MODELS)) ## the tests that a change must pass, in some minutes
	@$(PY) -m pytest -n 2 -m "not (slow or gpu or browser or export or peers)" tests
test-all: test test-slow ## and what is slow by nature: kills, two processes, real kernels, all kinds of base models
test-slow: $(READY) $(BASE_MODELS)
	@$(PY) -m pytest -n 2 -m "slow and not export" --durations=10 $(ARGS) tests
test-export: $(EXTRAS)/llama-cpp-python-0.3.36 $(EXTRAS)/gradio-6.20.0 $(BASE_MODELS) ## export and chat with llama.cpp, Gradio, chromium
	@$(EXTRAS)/bin/python $(PIP) go-template==0.0.3 selenium==4.51.0
	@$(EXTRAS)/bin/python -m pytest -m export -vv --durations=0 tests
test-gpu: $(READY) base-models ## what needs an NVIDIA GPU; skipped without one
	@$(PY) -m pytest -m gpu -rs -vv --durations=0 tests
test-browser: $(READY) $(BASE_MODELS) ## press Run All in JupyterLab; needs chromium and chromedriver
	@$(PY) $(PIP) jupyterlab==4.6.6 selenium==4.36.0 && $(PY) -m pytest -m browser -x -vv --durations=0 tests
test-peers: $(READY) base-models ## perplexity beside lm-evaluation-harness, which it installs, on both base models
	@grep -v ^-e requirements.txt | $(PY) $(PIP) -c /dev/stdin lm_eval==0.4.13 && HF_HUB_OFFLINE=1 $(PY) -m pytest -m peers -vv tests
reference: ## remake tests/reference after a change of a notebook
	@rm -rf runs/reference && $(MAKE) --no-print-directory 04_evaluate PROFILE=tiny RUN_DIR=runs/reference
	@cp runs/reference/0*.ipynb tests/reference && $(PY) -m nbconvert --log-level=ERROR $(TIDY) tests/reference/*.ipynb
examples: ## remake examples/cpu_run, the executed notebooks of the cpu profile, and its plot
	@rm -rf runs/examples && $(MAKE) --no-print-directory run-all PROFILE=cpu RUN_DIR=runs/examples
	@cp runs/examples/0*.ipynb runs/examples/evaluation/* examples/cpu_run
	@$(PY) -m nbconvert --log-level=ERROR $(TIDY) examples/cpu_run/*.ipynb
sync: $(READY) ## format notebooks_py/ and bring notebooks/ and parameters.json up to date with it, or it with notebooks/
	@$(PY) -m jupytext --quiet --sync notebooks_py/*.py && $(PY) -m tabletune sync --repository "$(REPO)"
	@$(PY) -m ruff format --quiet && $(PY) -m ruff check --quiet --fix && $(PY) -m jupytext --quiet --sync notebooks_py/*.py
badges: sync ## write repository (REPO=owner/name), ref and Colab's runtime of pyproject.toml into README, docs and notebooks
lint: $(READY) ## check format, names and pairs
	@$(PY) -m ruff format --check --quiet && $(PY) -m ruff check --quiet
lab: $(READY) ## open the notebooks in JupyterLab
	@$(PY) $(PIP) jupyterlab==4.6.6 && $(PY) -m jupyter lab notebooks
clean: ## delete runs/ and .cache/; the environment stays
	@rm -rf runs .cache .pytest_cache .ruff_cache
