# The front door: `make help` lists the commands. Each is one of `python -m tabletune`.
PYTHON ?= python3
VENV ?= .venv
PY := "$(if $(VENV),$(VENV)/bin/python,$(PYTHON))"
TABLETUNE := $(PY) -m tabletune
SETTINGS := PROFILE MODEL RUN_DIR GPUS ARGS RUNS OUT GRID SWEEP_DIR QUESTIONS MODEL_PART \
	PYTHON VENV REPO
RUN = $(if $(PROFILE),--profile "$(PROFILE)") $(MODEL:%=--model %) $(GPUS:%=--gpus %) \
	$(if $(RUN_DIR),"$(RUN_DIR)") $(if $(ARGS),--args="$$ARGS")
SWEEP = $(if $(GRID),--grid "$(GRID)") $(if $(SWEEP_DIR),--folder "$(SWEEP_DIR)")
SERIES := 01_format_dataset 02_finetune_qlora 03_merge_adapter 04_evaluate
export ARGS
export PYTHONUTF8 = 1
.DEFAULT_GOAL := help
include dev.mk

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
run-all: $(READY) ## notebooks 1 to 4: PROFILE=t4 MODEL=name RUN_DIR=folder ARGS="-p name value"
	@$(TABLETUNE) run-all $(RUN)
$(SERIES): $(READY)
	@$(TABLETUNE) run-all --until $@ $(RUN)
baselines: $(READY) ## notebook 5 on a finished run, was training worth it? RUN_DIR=folder
	@$(TABLETUNE) baselines $(RUN)
trust: $(READY) ## notebook 6 on a finished run, safety and memorization: RUN_DIR=folder
	@$(TABLETUNE) trust $(RUN)
export: $(call EXTRA,export) ## notebook 7 on a finished run, cards, GGUF, Ollama: RUN_DIR=folder
	@$(TABLETUNE) export $(RUN)
ask: $(READY) ## answer the questions of a file: RUN_DIR=folder QUESTIONS=file MODEL_PART=copy
	@$(TABLETUNE) ask $(RUN) --questions "$(QUESTIONS)" $(MODEL_PART:%=--part %)
index: $(READY) ## take new rows of the table into a run: RUN_DIR=folder ARGS="-p dataset new.csv"
	@$(TABLETUNE) index $(RUN)
chat: $(call EXTRA,chat) ## base and fine-tuned model side by side on a page: RUN_DIR=folder
	@$(TABLETUNE) chat $(RUN)
rate: $(call EXTRA,chat) ## let people rate answers, blind, on a page: RUN_DIR=folder
	@$(TABLETUNE) rate $(RUN)
report: $(READY) ## report.html, a page about a run: RUN_DIR=folder
	@$(TABLETUNE) report $(RUN)
compare: $(READY) ## a page with several runs: RUNS="folder folder" OUT=file.html
	@$(TABLETUNE) compare $(RUNS) $(if $(OUT),--out "$(OUT)")
sweep: $(READY) ## every combination of a grid of parameters: GRID=file.yaml SWEEP_DIR=folder
	@$(TABLETUNE) sweep $(RUN) $(SWEEP)
setup: $(READY) ## install the pinned packages into .venv; VENV= uses the current environment
base-models: $(READY) ## make the base models of the cpu and tiny profiles, in .cache
	@$(TABLETUNE) base-models
clean: ## delete caches and base models that can be made again; runs/ and .venv stay
	@rm -rf .cache .pytest_cache .ruff_cache .mypy_cache
