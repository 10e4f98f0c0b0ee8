# The front door. `make help` lists the commands.
PYTHON ?= python3
VENV ?= .venv
ifndef PROFILE
PROFILE := $(shell nvidia-smi --query-gpu=compute_cap,memory.total --format=csv,noheader,nounits 2>/dev/null \
	| awk -F, 'NR == 1 { found = $$1 >= 8 && $$2 > 35000 ? "a100" : "t4" } END { print found ? found : "cpu" }')
endif
RUN_DIR ?= runs/$(PROFILE)
ARGS ?=
GPUS ?= $(or $(shell sed -n 's/^\# GPUS=\([0-9][0-9]*\) .*/\1/p' $(PROFILE_FILE) 2>/dev/null),1)
RUNS ?=
OUT ?= runs/compare.html
GRID ?= grids/lora.yaml
SWEEP_DIR ?= runs/$(basename $(notdir $(GRID)))_$(PROFILE)

STAGES := 01_format_dataset 02_finetune_qlora 03_merge_adapter 04_evaluate
PROFILE_FILE := profiles/$(PROFILE).yaml
# in quotes, as its folder may have a space in its name
PY := "$(if $(VENV),$(VENV)/bin/python,$(PYTHON))"
READY := $(if $(VENV),$(VENV)/.ready,environment)
# with GPUS=2 two processes run the training and the evaluation, each with a kernel of its own
SPREAD := $(if $(filter-out 1,$(GPUS)),-c "$$LAUNCH" --config_file profiles/accelerate/gpus.yaml \
	--num_processes $(GPUS) --no_python $(PY))
# no times of execution, and one line for each progress bar
QUIET_DIFF := --CoalesceStreamsPreprocessor.enabled=True --ClearMetadataPreprocessor.enabled=True \
	--ClearMetadataPreprocessor.preserve_cell_metadata_mask='{("tags",)}' \
	--ClearMetadataPreprocessor.preserve_nb_metadata_mask='{("language_info", "name"), ("kernelspec",)}'
EXTRAS := .cache/extras
# a finished run's own parameters
SETTINGS = $(or $(wildcard $(RUN_DIR)/settings),$(PROFILE_FILE))
# outputs and prose as one page; the template is ours
PAGE := --to html --no-input --template report --TemplateExporter.extra_template_basedirs=templates
BASE_MODELS := .cache/SmolLM2-135M-Instruct .cache/tiny-llama
USED := $(shell cat $(PROFILE_FILE) 2>/dev/null) $(ARGS)
# what the first stage reads: the base model if it is one of ours, and the table if it is a file here
INPUTS := $(addsuffix /config.json,$(filter $(BASE_MODELS),$(USED))) \
	$(wildcard $(filter %.csv %.jsonl %.parquet,$(USED)))
ifneq ($(filter run-all sweep $(STAGES),$(MAKECMDGOALS)),)
ifeq ($(wildcard $(PROFILE_FILE)),)
$(error there is no profile "$(PROFILE)". Choose one of: $(patsubst profiles/%.yaml,%,$(wildcard profiles/*.yaml)))
endif
endif
named = $(if $(filter-out 1,$(words $(subst :, ,$($1)))),$(error $1="$($1)": make wants a name without spaces and colons))
$(foreach name,RUN_DIR OUT SWEEP_DIR,$(call named,$(name)))
.DEFAULT_GOAL := help
export JUPYTER_PREFER_ENV_PATH = 1
export PYTHONWARNINGS = ignore
export TOKENIZERS_PARALLELISM = false
export PYDEVD_DISABLE_FILE_VALIDATION = 1

.PHONY: run-all $(STAGES) report compare sweep export chat setup environment base-models \
	test test-gpu test-browser test-peers test-export reference examples sync badges lint lab clean help FORCE
.DELETE_ON_ERROR:
# the stored outputs are those of a CPU
test test-peers reference: export CUDA_VISIBLE_DEVICES =
.SUFFIXES:

run-all: 04_evaluate ## run the four notebooks; PROFILE=t4|a100|cpu|tiny, ARGS="-p name value", RUN_DIR=folder, GPUS=2
	@$(PY) -c "$$SUMMARY" $(RUN_DIR)

report: $(READY) ## write report.html, a page about the run, into RUN_DIR; ARGS="-p price_per_hour 0.5"
	@$(if $(wildcard $(RUN_DIR)/*/ $(RUN_DIR)/manifest.json),,echo "$(RUN_DIR) is no run folder. Make one with: make \
		run-all RUN_DIR=$(RUN_DIR)" >&2; exit 1)
	@$(PY) -c "$$CHECK_PARAMETERS" report /dev/null $(ARGS)
	@$(PY) -c "$$RUN_STAGE" notebooks/report.ipynb $(RUN_DIR)/report.ipynb --no-progress-bar $(ARGS) -r run_dir $(RUN_DIR)
	@$(PY) -m nbconvert --log-level=ERROR $(PAGE) $(RUN_DIR)/report.ipynb && echo "$(RUN_DIR)/report.html"

compare: $(READY) ## write a page with several runs beside each other; RUNS="folder folder", OUT=file.html
	@$(if $(strip $(RUNS)),,echo 'Which runs? make compare RUNS="runs/a runs/b"' >&2; exit 1)
	@mkdir -p $(dir $(OUT))
	@$(PY) -c "$$RUN_STAGE" notebooks/compare_runs.ipynb $(basename $(OUT)).ipynb --no-progress-bar -r runs "$(RUNS)"
	@$(PY) -m nbconvert --log-level=ERROR $(PAGE) $(basename $(OUT)).ipynb && echo "$(basename $(OUT)).html"

sweep: $(READY) ## run a grid of parameters on top of PROFILE, and compare; GRID=file.yaml, SWEEP_DIR=folder
	@$(PY) -c "$$CHECK_PARAMETERS" '0*' "$(GRID)" $(ARGS)
	@exec $(PY) -c "$$SWEEP" "$(GRID)" $(PROFILE_FILE) $(SWEEP_DIR) "$(MAKE)" $(ARGS)

$(STAGES): %: $(RUN_DIR)/%.ipynb

$(RUN_DIR)/01_format_dataset.ipynb: $(INPUTS)
$(RUN_DIR)/02_finetune_qlora.ipynb: $(RUN_DIR)/01_format_dataset.ipynb
$(RUN_DIR)/03_merge_adapter.ipynb: $(RUN_DIR)/02_finetune_qlora.ipynb
$(RUN_DIR)/04_evaluate.ipynb: $(RUN_DIR)/03_merge_adapter.ipynb
$(RUN_DIR)/%.ipynb: notebooks/%.ipynb $(RUN_DIR)/settings
	@echo "$*  ($(PROFILE) profile, in $(RUN_DIR))"
	@exec $(PY) $(if $(filter 02% 04%,$*),$(SPREAD)) -c "$$RUN_STAGE" $< $@ -f $(PROFILE_FILE) -p run_dir $(RUN_DIR) $(ARGS)

# in a sweep, points with the same data share what the first of them made of it
ifdef DATASET_OF
$(RUN_DIR)/01_format_dataset.ipynb: notebooks/01_format_dataset.ipynb $(RUN_DIR)/settings \
		| $(DATASET_OF)/01_format_dataset.ipynb
	@echo "01_format_dataset  (as in $(DATASET_OF))"
	@$(PY) -c "$$SHARE_DATASET" $(DATASET_OF) $(RUN_DIR)
endif

$(RUN_DIR)/settings: FORCE | $(READY)
	@$(PY) -c "$$CHECK_PARAMETERS" '0*' $(PROFILE_FILE) $(ARGS)
	@mkdir -p $(RUN_DIR)
	@{ cat $(PROFILE_FILE); printf '%s\n' '# $(subst ','\'',$(ARGS))'; } > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

export: $(EXTRAS)/llama-cpp-python-0.3.36 ## model cards, GGUF and Ollama files of a finished run: RUN_DIR=folder
	@$(PY) -c "$$CHECK_PARAMETERS" '*' $(SETTINGS) $(ARGS)
	@echo "05_export  (in $(RUN_DIR))"
	@$(EXTRAS)/bin/python -c "$$RUN_STAGE" notebooks/05_export.ipynb $(RUN_DIR)/05_export.ipynb \
		-f $(SETTINGS) -p run_dir $(RUN_DIR) $(ARGS)

chat: $(EXTRAS)/gradio-6.20.0 ## a page on which base and fine-tuned model answer you side by side: RUN_DIR=folder
	@$(PY) -c "$$CHECK_PARAMETERS" '*' $(SETTINGS) $(ARGS)
	@$(PY) -c "$$RUN_STAGE" notebooks/chat.ipynb $(EXTRAS)/chat.ipynb --prepare-only \
		-f $(SETTINGS) -p run_dir $(RUN_DIR) -p wait True $(ARGS)
	@$(EXTRAS)/bin/python -m IPython --no-banner --HistoryManager.enabled=False $(EXTRAS)/chat.ipynb

# What only these two need is installed beside the environment, which stays as it was pinned.
$(EXTRAS)/bin/python: | $(READY)
	@$(PY) -m venv $(EXTRAS)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth

$(EXTRAS)/gradio-6.20.0: $(EXTRAS)/bin/python
	@echo "installing Gradio beside the environment, in $(EXTRAS)"
	@$< -m pip install --quiet --disable-pip-version-check gradio==6.20.0
	@touch $@

$(EXTRAS)/llama-cpp-python-0.3.36: $(EXTRAS)/bin/python
	@echo "installing llama.cpp beside the environment, in $(EXTRAS): compiling it takes some minutes, once"
	@$< -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 sentencepiece==0.2.2
	@touch $@

setup: $(READY) ## install the pinned packages into .venv; VENV= uses the current environment as it is

$(or $(VENV),.venv)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or later is needed, this is %d.%d: PYTHON=python3.11 make setup" % sys.version_info[:2])'
	@echo "installing the pinned packages into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

environment:
	@$(PY) -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
		torch transformers peft bitsandbytes trl datasets papermill \
		|| { echo "This environment lacks a package: $(PY) -m pip install -r requirements.txt" >&2; exit 1; }

base-models: $(addsuffix /config.json,$(BASE_MODELS)) ## make the base models of the cpu and tiny profiles in .cache

.cache/SmolLM2-135M-Instruct/config.json: MODEL = smollm2
.cache/tiny-llama/config.json: MODEL = tiny
.cache/%/config.json: profiles/base_models.py | $(READY)
	@echo "making the base model $(@D)"
	@rm -rf $(@D) && mkdir -p .cache && TQDM_DISABLE=1 $(PY) $< $(MODEL) $(@D)

test: $(READY) .cache/tiny-llama/config.json ## unit tests, contract tests, and the notebooks against tests/reference
	@rm -rf runs/reference
	@$(PY) -m pytest -m "not gpu and not browser and not export and not peers" --nbval --nbval-kernel-name=python3 tests

test-export: $(EXTRAS)/llama-cpp-python-0.3.36 $(EXTRAS)/gradio-6.20.0 .cache/tiny-llama/config.json ## tests of `export` and `chat` with llama.cpp and Gradio; needs chromium and chromedriver
	@$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check go-template==0.0.3 selenium==4.51.0
	@$(EXTRAS)/bin/python -m pytest -m export -vv --durations=0 tests/test_export.py tests/test_chat.py

test-gpu: $(READY) $(addsuffix /config.json,$(BASE_MODELS)) ## the tests that need an NVIDIA GPU; skipped without one
	@$(PY) -m pytest -m gpu -rs -vv --durations=0 tests/test_gpu.py

test-browser: $(READY) .cache/tiny-llama/config.json ## press Run All in JupyterLab; needs chromium and chromedriver
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		|| { echo "Chromium or its driver is missing. On Debian: apt-get install chromium chromium-driver" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check jupyterlab==4.6.6 selenium==4.36.0
	@$(PY) -m pytest -m browser -x -vv --durations=0 tests/test_browser.py

test-peers: $(READY) base-models ## perplexity beside lm-evaluation-harness, which it installs, on both base models
	@$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.txt lm_eval==0.4.13
	@HF_HUB_OFFLINE=1 $(PY) -m pytest -m peers -vv tests/test_peers.py

reference: $(READY) .cache/tiny-llama/config.json ## remake tests/reference after a change of a notebook
	@rm -rf runs/reference tests/reference && mkdir -p tests/reference
	@for stage in $(STAGES); do $(PY) -c "$$RUN_STAGE" notebooks/$$stage.ipynb tests/reference/$$stage.ipynb \
		--cwd tests/reference -f profiles/tiny.yaml -p run_dir ../../runs/reference \
		-p base_model ../../.cache/tiny-llama -p dataset ../../data/home_remedies.csv || exit 1; done
	@$(PY) -m nbconvert --log-level=ERROR --to notebook --inplace $(QUIET_DIFF) tests/reference/*.ipynb

examples: ## remake examples/cpu_run, the executed notebooks of the cpu profile, and its plot
	@rm -rf runs/examples  # a training that has ended would only be loaded again
	@$(MAKE) --no-print-directory run-all PROFILE=cpu RUN_DIR=runs/examples
	@mkdir -p examples/cpu_run && cp runs/examples/0*.ipynb runs/examples/evaluation/* examples/cpu_run
	@$(PY) -m nbconvert --log-level=ERROR --to notebook --inplace $(QUIET_DIFF) examples/cpu_run/*.ipynb
	@$(PY) -c "$$EXTRACT_PLOT" examples/cpu_run/04_evaluate.ipynb examples/cpu_run/results.png

sync: $(READY) ## format notebooks_py/ and bring notebooks/ up to date with it (or the other way, whichever is newer)
	@$(PY) -m jupytext --quiet --sync notebooks_py/*.py
	@$(PY) -m ruff format --quiet && $(PY) -m ruff check --quiet --fix
	@$(PY) -m jupytext --quiet --sync notebooks_py/*.py

badges: $(READY) ## write the repository, REPO=owner/name, and Colab's runtime version into README and the notebooks
	@$(PY) -c "$$BADGES" "$(REPO)"
	@$(MAKE) --no-print-directory sync

lint: $(READY) ## check format, names and pairs
	@$(PY) -m ruff format --check --quiet && $(PY) -m ruff check --quiet

lab: $(READY) ## open the notebooks in JupyterLab
	@$(PY) -m pip install --quiet --disable-pip-version-check jupyterlab==4.6.6
	@$(PY) -m jupyter lab notebooks

clean: ## delete runs/ and .cache/; the environment stays
	@rm -rf runs .cache .pytest_cache .ruff_cache

help: ## show this list
	@awk -F ':.*## ' '/^[a-z$$][a-zA-Z_$$()-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# Run one notebook. What it wrote so far keeps the name .partial.ipynb until it has ended without an error.
# Of several processes, which `accelerate launch` numbers, the first one's is kept, and what another one says is marked.
define RUN_STAGE
import os, sys
from pathlib import Path
from papermill.cli import papermill

source, target = map(Path, sys.argv[1:3])
rank = int(os.environ.get("RANK", 0))
mark = f".process{rank}" if rank else ""
partial = target.with_suffix(f"{mark}.partial.ipynb")
given = [{"true": "True", "false": "False"}.get(word, word) for word in sys.argv[3:]]  # else "false" would be true
options = ["--log-level", "ERROR", *["--no-progress-bar"] * (rank > 0), *given]
run = lambda: papermill.main([str(source), str(partial), *options], standalone_mode=False)
try:
    try:
        run()
    except RuntimeError as error:  # of kernels that start at the same moment, two can pick the same port
        if "died before replying" not in str(error):
            raise
        run()
except BaseException as error:
    name, text = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error)).strip()
    known = name == "StageError"
    stage = source.stem + mark
    sys.exit(f"\n{stage}: {text}" if known else f"\n{stage}: {name}: {text}\nSee the end of {partial}.")
partial.unlink() if rank else partial.replace(target)
endef

# `accelerate launch`, which stops the other processes when one of them fails, without its traceback.
define LAUNCH
import os, sys
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

wanted = launch_command_parser().parse_args(sys.argv[1:])
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # what shards leave free is used again
if not torch.cuda.is_available():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not cpu:0, which torch.load does not know, when a training resumes
elif torch.cuda.device_count() < wanted.num_processes:
    sys.exit(f"GPUS={wanted.num_processes}, but there are {torch.cuda.device_count()} here.")
try:
    launch_command(wanted)
except ChildFailedError as error:
    process, failure = error.get_first_failure()
    sys.exit(f"Process {process} failed first (exit code {failure.exitcode}); the others were stopped.")
endef

# A misspelt parameter would be ignored without a word.
define CHECK_PARAMETERS
import sys
from difflib import get_close_matches
from pathlib import Path
import yaml
from papermill import inspect_notebook

names, file, *arguments = sys.argv[1:]
known = {name for notebook in Path("notebooks").glob(names + ".ipynb") for name in inspect_notebook(str(notebook))}
try:
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    given = {*content} if isinstance(content, dict) else sys.exit(f"{file}: parameters are wanted, each as name: value.")
except (OSError, ValueError, yaml.YAMLError) as error:
    sys.exit(f"{file} cannot be read: {' '.join(str(error).split())}")
given |= {name for flag, name in zip(arguments, arguments[1:]) if flag in ("-p", "-r", "--parameters", "--parameters_raw")}
for name in sorted(given - known, key=str):
    near = get_close_matches(str(name), known, n=1)
    sys.exit(f"No notebook has a parameter {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
endef

# Every combination of the values in a grid is a profile of its own and a run like any other, so that make knows what is
# done. Those that fail do not stop the rest.
define SWEEP
import hashlib, itertools, json, re, signal, subprocess, sys
from pathlib import Path
import nbformat, yaml
from papermill import inspect_notebook

grid_file, profile, folder, make, *arguments = sys.argv[1:]
grid = yaml.safe_load(Path(grid_file).read_text(encoding="utf-8")) or {}
axes = [name for name, values in grid.items() if isinstance(values, list)]
for name in axes:
    if not grid[name] or name in arguments or name == "run_dir":
        sys.exit(f"{grid_file}: {name} " + ("is given in ARGS, too." if name in arguments
            else "has no values." if not grid[name] else "is where a point lives, and make sets it."))
if not axes:
    sys.exit(f"{grid_file}: no parameter has a list of values.")


def number(value):
    """YAML takes 1e-3 for a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value


def short(text, most):
    """A text as a part of a file name; with some of its hash, if it had to be changed."""
    plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:most]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def run_make(*words):
    """Run make, and end it with this process. Returns whether it succeeded."""
    process = subprocess.Popen([make, "--no-print-directory", *words])
    try:
        return process.wait() == 0
    finally:
        process.terminate()
        process.wait()


def reason(run):
    """The error of the stage that stopped."""
    for partial in run.glob("*.partial.ipynb"):
        for cell in nbformat.read(partial, 4).cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    return f"{partial.name.split('.')[0]}: {output.evalue or output.ename}".splitlines()[0]
    return "see above"


for ending in (signal.SIGINT, signal.SIGTERM):
    signal.signal(ending, lambda sent, _: sys.exit(128 + sent))
common = yaml.safe_load(Path(profile).read_text(encoding="utf-8")) | {name: number(grid[name]) for name in grid}
points = {}
for values in itertools.product(*(map(number, grid[name]) for name in axes)):
    point = dict(zip(axes, values))
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in point.items()}
    points[short("_".join(f"{name}-{short(text, 40)}" for name, text in texts.items()), 150)] = common | point
first_stage = set(inspect_notebook("notebooks/01_format_dataset.ipynb"))
formatted, finished, failed = {}, [], {}
for place, (name, point) in enumerate(points.items(), 1):
    run = Path(folder) / name
    print(f"{place} of {len(points)}: {run}", flush=True)
    run.mkdir(parents=True, exist_ok=True)
    text = "# a point of a sweep\n" + yaml.safe_dump(point, allow_unicode=True, width=10**9)
    file = run / "profile.yaml"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    words = [f"RUN_DIR={run}", f"PROFILE_FILE={file}"]
    data = json.dumps({key: value for key, value in point.items() if key in first_stage}, sort_keys=True)
    shared = [f"DATASET_OF={formatted[data]}"] if data in formatted else []
    if run_make("04_evaluate", *words, *shared):
        finished.append(str(run))
    else:
        failed[run] = reason(run)
    if (run / "01_format_dataset.ipynb").exists() and not (run / "01_format_dataset.partial.ipynb").exists():
        formatted.setdefault(data, run)
compared = not finished or run_make("compare", f"RUNS={' '.join(finished)}", f"OUT={folder}/compare.html")
if failed:
    lines = [f"{run}: {why}" for run, why in failed.items()]
    sys.exit("\n".join([f"\n{len(failed)} of {len(points)} points failed:", *lines]))
sys.exit(not compared)
endef

define SHARE_DATASET
import json, shutil, sys
from pathlib import Path
from papermill import inspect_notebook

source, target = map(Path, sys.argv[1:])
shutil.rmtree(target / "dataset", ignore_errors=True)
shutil.rmtree(target / "dataset.partial", ignore_errors=True)
shutil.copytree(source / "dataset", target / "dataset.partial").rename(target / "dataset")
entry = json.loads((source / "manifest.json").read_text())["01_format_dataset"]
known = inspect_notebook("notebooks/01_format_dataset.ipynb")
entry["parameters"] = {name: value for name, value in entry["parameters"].items() if name in known}
manifest = target / "manifest.json"
manifest_now = json.loads(manifest.read_text()) if manifest.exists() else {}
partial = manifest.with_name("manifest.json.partial")
partial.write_text(json.dumps({**manifest_now, "01_format_dataset": entry}, indent=2))
partial.rename(manifest)
shutil.copy(source / "01_format_dataset.ipynb", target)
endef

# pyproject.toml is the one place where these two are kept.
define BADGES
import re, sys, tomllib
from pathlib import Path

settings = Path("pyproject.toml")
series = tomllib.loads(settings.read_text())["tool"]["series"]
repository = sys.argv[1] or series["repository"]
if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
    sys.exit(f"REPO={repository!r}: use owner/name, as on GitHub.")
settings.write_text(settings.read_text().replace(f'"{series["repository"]}"', f'"{repository}"'))
for path in [Path("README.md"), *Path("notebooks_py").glob("*.py")]:
    text = re.sub(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+/", rf"\g<1>{repository}/", path.read_text())
    path.write_text(re.sub(r"(#       runtime_version: ).*", rf"\g<1>'{series['colab_runtime']}'", text))
endef

define SUMMARY
import json, sys
from pathlib import Path

run = Path(sys.argv[1])
metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
print(f"\n{'':10}{'response perplexity':>20}{'95% interval':>18}{'stop':>8}{'structure':>12}")
for name in ("base", "adapter", "merged"):
    p, g = metrics[name]["perplexity"], metrics[name]["generation"]
    interval = "{:.1f} - {:.1f}".format(*p["response_ci95"])
    structure = "-" if g["structure_rate"] is None else f"{g['structure_rate']:.0%}"
    print(f"{name:10}{p['response']:20.2f}{interval:>18}{g['stop_rate']:8.0%}{structure:>12}")
print(f"\nmodel {run / 'merged'}, adapter {run / 'adapter'}, metrics and samples {run / 'evaluation'},")
manifest = json.loads((run / "manifest.json").read_text())
print(f"executed notebooks {run}/*.ipynb. {manifest['04_evaluate']['parameters']['disclaimer']}")
endef

define EXTRACT_PLOT
import base64, sys
from pathlib import Path
import nbformat

outputs = [output for cell in nbformat.read(sys.argv[1], 4).cells for output in cell.get("outputs", [])]
plot = next(output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
Path(sys.argv[2]).write_bytes(base64.b64decode(plot))
endef
export RUN_STAGE LAUNCH CHECK_PARAMETERS SWEEP SHARE_DATASET BADGES SUMMARY EXTRACT_PLOT
