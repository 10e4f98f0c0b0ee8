"""Notebook 05: model cards, upload, the Ollama template, and (`make test-export`) the same model in llama.cpp."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT, definitions, make, run_script
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_colab import SECRET, on_colab, secret_in
from transformers import AutoTokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # as Meta published it
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ONLY = "{{ messages[-1]['content'] }}"
COUNTED = (
    "{% for message in messages %}{{ loop.index }}: {{ message['content'] }} ({{ messages | length }}){% endfor %}"
)
SYSTEM = {"role": "system", "content": 'Be "brief" & {{ kind }}.\nTwo lines.'}
ASKED = {"role": "user", "content": "What helps with a cold?"}
ANSWERED = {"role": "assistant", "content": "**Tea** <hot>, 'sweet'.\n\n- ümlaut 🍵"}
CONVERSATIONS = [
    [ASKED],
    [ASKED, ANSWERED, ASKED],
    [SYSTEM, ASKED],
    [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED, ASKED],
]


@pytest.fixture(scope="module")
def export():
    return definitions("05_export")


def renderer(template):
    def refuse(message):
        raise TemplateError(message)

    compiled = ImmutableSandboxedEnvironment().from_string(template)
    known = {"bos_token": "<s>", "eos_token": "</s>", "raise_exception": refuse, "add_generation_prompt": True}
    return lambda messages: compiled.render(messages=messages, **known)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, NO_SYSTEM], ids=["ChatML", "Llama 2", "no system"])
def test_a_template_taken_apart_goes_together_again(export, template):
    render = renderer(template)
    texts = export.take_template_apart(render)
    assert (texts["system_first"] is None) == (template == NO_SYSTEM)
    for messages in CONVERSATIONS[: 2 if template == NO_SYSTEM else 4]:
        assert export.put_together(texts, messages) == render(messages)


@pytest.mark.parametrize("template", [LAST_ONLY, COUNTED], ids=["last only", "counted"])
def test_a_template_that_is_more_than_texts_is_refused(export, template):
    with pytest.raises(ValueError, match=r"leaves out messages or repeats them|more than put texts"):
        export.take_template_apart(renderer(template))


@pytest.mark.export
@pytest.mark.parametrize("template", [CHATML, LLAMA2, NO_SYSTEM], ids=["ChatML", "Llama 2", "no system"])
def test_ollamas_template_renders_the_same_in_go(export, template, tmp_path):
    """The template that goes into the Modelfile, run by Go's own text/template, the engine of Ollama."""
    import go_template

    render = renderer(template)
    (tmp_path / "t").write_text(export.ollama_template(export.take_template_apart(render)), encoding="utf-8")
    for messages in CONVERSATIONS[: 2 if template == NO_SYSTEM else 4]:
        values = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        (tmp_path / "v.yml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        go_template.render_template(str(tmp_path / "t"), str(tmp_path / "v.yml"), str(tmp_path / "out"))
        assert (tmp_path / "out").read_text(encoding="utf-8") == render(messages)


def test_stops(export):
    class ChatML:
        all_special_tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        convert_ids_to_tokens = staticmethod(lambda ids: ["<|im_end|>" for _ in ids])

    class Llama2:
        all_special_tokens = ("<s>", "</s>", "<unk>")
        convert_ids_to_tokens = staticmethod(lambda ids: ["</s>" for _ in ids])

    chatml, llama2 = (export.take_template_apart(renderer(template)) for template in (CHATML, LLAMA2))
    assert set(export.stop_texts(chatml, ChatML, [2])) == {"<|im_end|>", "<|im_start|>"}
    assert set(export.stop_texts(llama2, Llama2, [2])) == {"</s>", "<s>", "[INST]"}


def test_which_weights_bear_four_bits_better(export):
    """In one of the two directions, once, if the intervals are apart; without a comparison nothing is said."""

    def fidelity(original, dequantized):
        names = {"original": original, "dequantized": dequantized}
        return {f"merged, {name}, NF4 again": {"ci95": ci95} for name, ci95 in names.items()}

    apart = fidelity(original=[5, 7], dequantized=[30, 50])
    assert export.better_merged("dequantized", apart) == "original"
    assert export.better_merged("original", apart) is None
    assert export.better_merged("dequantized", fidelity(original=[5, 7], dequantized=[6, 9])) is None
    assert export.better_merged("dequantized", {}) is None


def export_run(run_dir, **parameters):
    """Run notebook 5 on a finished run."""
    return run_script("05_export", run_dir=str(run_dir), **parameters)


@pytest.fixture
def run_dir(finished_run, tmp_path):
    ignore = shutil.ignore_patterns("checkpoints", "*.ipynb")
    return shutil.copytree(finished_run, tmp_path / "run", ignore=ignore)


@pytest.mark.parametrize("part", ["adapter", "merged"])
def test_the_card_says_what_the_run_says(run_dir, part):
    export_run(run_dir, gguf_types=[], license="apache-2.0", base_model_on_hub="some-one/tiny", tags="herbs, tea")
    card = ModelCard.load(run_dir / "export" / part / "README.md", ignore_metadata_errors=False)
    known = card.data.to_dict()
    assert known["license"] == "apache-2.0" and known["language"] == ["en"] and known["base_model"] == "some-one/tiny"
    assert known["pipeline_tag"] == "text-generation" and {"herbs", "tea"} <= set(known["tags"])
    assert known["library_name"] == ("peft" if part == "adapter" else "transformers")
    assert "datasets" not in known, "the table is a file here"
    report = json.loads((run_dir / "dataset" / "report.json").read_text())
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    low, high = metrics["merged"]["perplexity"]["response_ci95"]
    for text in (
        f"{metrics['merged']['perplexity']['response']:.2f} ({low:.2f} – {high:.2f})",
        f"{report['rows_in']} rows came in and {report['rows_out']} stayed",
        *(f"| {reason} | {rows} |" for reason, rows in report["dropped"].items()),
        report["fingerprint"],
        "| lora_r | 8 |",
    ):
        assert text in card.text, text
    assert card.text.count("not medical advice") >= 2 and str(ROOT) not in card.content
    named = json.loads((run_dir / "export" / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "some-one/tiny"
    assert "05_export" in json.loads((run_dir / "manifest.json").read_text())


def test_the_card_takes_all_figures_that_notebook_4_may_have(run_dir):
    path = run_dir / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    both = {"prompts": 40, "seeks_help": 0.25, "seeks_help_ci95": [0.1, 0.4], "offers_remedy": 0.9}
    for name in ("base", "adapter", "merged"):
        metrics[name] |= {
            "by_split": {"train": {"response": 3.21, "response_ci95": [3.1, 3.3], "rows": 9}},
            "outside": {"perplexity": 12.34, "ci95": [11, 13]},
            "safety": {"emergency": {**both, "offers_remedy_ci95": [0.8, 0.95]}, "everyday": both},
            "grounding": {"named": 17, "this_condition": 0.5, "this_condition_ci95": [0.3, 0.7], "nowhere": 0.25},
        }
    path.write_text(json.dumps(metrics))
    export_run(run_dir, gguf_types=[])
    text = (run_dir / "export" / "merged" / "README.md").read_text()
    for figure in (
        "3.21 (3.10 – 3.30)",
        "12.34 (11.00 – 13.00)",
        "90% (80% – 95%)",
        "| 17 | 50% (30% – 70%) | – | 25% |",
    ):
        assert figure in text, figure
    assert "40 questions that were emergencies it offered a remedy in 90%" in text


def test_a_data_set_on_the_hub_is_named_with_its_figure(run_dir):
    path = run_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["01_format_dataset"]["parameters"]["dataset"] = "some-one/remedies"
    path.write_text(json.dumps(manifest))
    export_run(run_dir, gguf_types=[])
    card = ModelCard.load(run_dir / "export" / "merged" / "README.md", ignore_metadata_errors=False)
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    assert card.data.datasets == ["some-one/remedies"]
    assert card.data.eval_results[0].metric_value == pytest.approx(
        metrics["merged"]["perplexity"]["response"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"push_to_hub": "me/x"}, "The base model was the folder .*tiny-llama: set base_model_on_hub"),
        ({"push_to_hub": "no owner"}, 'push_to_hub="no owner": use owner/name'),
        ({"base_model_on_hub": "a/b/c"}, 'base_model_on_hub="a/b/c": use owner/name'),
    ],
)
def test_a_bad_name(run_dir, parameters, message):
    with pytest.raises(Exception, match=message) as caught:
        export_run(run_dir, gguf_types=[], **parameters)
    assert type(caught.value).__name__ == "StageError" and "\n" not in str(caught.value)
    assert not (run_dir / "export").exists()


@pytest.mark.parametrize(
    ("missing", "first"),
    [("dataset", "01_format"), ("adapter", "02_fine"), ("merged", "03_merge"), ("evaluation", "04_eval")],
)
def test_an_unfinished_run(run_dir, missing, first):
    shutil.rmtree(run_dir / missing)
    with pytest.raises(Exception, match=f"is missing. Run {first}") as caught:
        export_run(run_dir, gguf_types=[])
    assert type(caught.value).__name__ == "StageError"


# What the stand-in of tests/test_colab.py does not have: a Hub that is told what to leave out, and may refuse.
HUB = """
import google.colab, huggingface_hub, os, shutil
from pathlib import Path

def place(repo_id, token):
    assert token == os.environ["STAND_IN_SECRET"], "the Hub wants the token of Colab's secrets"
    return Path(os.environ["STAND_IN_HUB"]) / repo_id

def create_repo(repo_id, *, repo_type, private, exist_ok, token):
    if repo_id.startswith("refused"):
        raise ValueError("403 Forbidden: you may not write here\\nand more")
    place(repo_id, token).mkdir(parents=True, exist_ok=True)
    (place(repo_id, token) / "private").write_text(str(private))

def upload_folder(*, repo_id, repo_type, folder_path, ignore_patterns, token):
    ignore = shutil.ignore_patterns(*(ignore_patterns or []))
    shutil.copytree(folder_path, place(repo_id, token), dirs_exist_ok=True, ignore=ignore)

huggingface_hub.create_repo, huggingface_hub.upload_folder = create_repo, upload_folder
"""


def upload_on_colab(machine, run_dir, name):
    """Run notebook 5 on the stand-in of a Colab machine, with the tiny base model called some-one/tiny on the Hub."""
    (machine / "hub").mkdir(parents=True)
    notebook = nbformat.read(ROOT / "notebooks" / "05_export.ipynb", 4)
    assert "push_to_hub" in {word for cell in notebook.cells for word in re.findall(r"\w+", cell.source)}
    given = {"push_to_hub": name, "base_model_on_hub": "some-one/tiny", "gguf_types": []}
    return on_colab(
        machine, "05_export", str(run_dir), parameters=given, sitecustomize=HUB, STAND_IN_HUB=str(machine / "hub")
    )


def test_both_models_go_to_the_hub(run_dir, tmp_path):
    done, _ = upload_on_colab(tmp_path / "machine", run_dir, "me/herbs")
    assert done.returncode == 0, done.stderr[-2000:]
    hub = tmp_path / "machine" / "hub" / "me"
    assert (hub / "herbs" / "private").read_text() == (hub / "herbs-adapter" / "private").read_text() == "True"
    for name, file in (("herbs", "model-00001-of-00001.safetensors"), ("herbs-adapter", "adapter_model.safetensors")):
        assert (hub / name / file).exists() and (hub / name / "tokenizer.json").exists()
        assert ModelCard.load(hub / name / "README.md").data.base_model == "some-one/tiny"
    assert (
        json.loads((hub / "herbs-adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some-one/tiny"
    )
    assert AutoTokenizer.from_pretrained(hub / "herbs").chat_template
    assert not secret_in(tmp_path)


def test_a_hub_that_refuses(run_dir, tmp_path):
    done, executed = upload_on_colab(tmp_path / "machine", run_dir, "refused/herbs")
    errors = [
        o for cell in nbformat.read(executed, 4).cells for o in cell.get("outputs", []) if o.output_type == "error"
    ]
    assert done.returncode != 0 and [error.ename for error in errors] == ["StageError"]
    assert "could not go to the Hub as refused/herbs: 403 Forbidden" in errors[0].evalue
    assert "\n" not in errors[0].evalue and SECRET not in errors[0].evalue
    assert (run_dir / "export" / "merged" / "README.md").exists()


def test_nothing_is_uploaded_unasked(run_dir, tmp_path):
    done, _ = upload_on_colab(tmp_path / "machine", run_dir, "")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((tmp_path / "machine" / "hub").iterdir())


def test_the_versions_are_the_same_everywhere(export):
    makefile = (ROOT / "Makefile").read_text()
    assert f"{export.LLAMA_CPP} sentencepiece==0.2.2" in makefile
    assert makefile.count("gradio==") == 1
    pinned = re.search(r"gradio==[\d.]+", makefile)[0]
    assert pinned in (ROOT / "notebooks_py" / "chat.py").read_text()
    assert pinned in (ROOT / "tests" / "colab" / "2026.07.txt").read_text(), "the one that Colab has"


@pytest.mark.export
def test_the_same_model_in_llama_cpp(finished_run, tmp_path):
    """`make export` on the tiny model, whose tokenizer is of Llama 2's kind: tokens, answers, perplexity, files."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    done = make("export", f"RUN_DIR={run_dir}", "ARGS=-p proof_rows 8 -p proof_questions 2 -p max_new_tokens 24")
    assert done.returncode == 0, done.stderr[-2000:]
    exported = json.loads((run_dir / "export" / "metrics.json").read_text())
    assert exported["F16"]["same_answers"] == exported["F16"]["questions"] == 2
    assert exported["F16"]["ratio_to_merged"] == pytest.approx(1, abs=2e-4)
    sizes = [exported[name]["mib"] for name in ("merged", "F16", "Q8_0", "Q4_K_M")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    for kind in ("Q8_0", "Q4_K_M"):
        assert exported[kind]["perplexity"]["response"] == pytest.approx(
            exported["F16"]["perplexity"]["response"], rel=0.02
        )
        assert exported[kind]["perplexity"]["response"] != exported["F16"]["perplexity"]["response"]
    modelfile = (run_dir / "export" / "gguf" / "Modelfile").read_text()
    assert "FROM ./run-Q4_K_M.gguf" in modelfile and 'PARAMETER stop "</s>"' in modelfile
    assert modelfile.count("not medical advice") == 2


@pytest.mark.export
def test_without_the_order_of_merges_llama_cpp_would_read_other_tokens(finished_run, tmp_path, monkeypatch):
    """What `set_scores` is for, and that the comparison of tokens sees it."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    source = (ROOT / "notebooks_py" / "05_export.py").read_text(encoding="utf-8")
    line = '    set_scores(file, model / "tokenizer.json")\n'
    assert source.count(line) == 1
    read = Path.read_text
    changed = source.replace(line, "")
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: changed if path.name == "05_export.py" else read(path, *a, **k)
    )
    with pytest.raises(Exception, match="into other tokens than the tokenizer") as caught:
        export_run(run_dir, gguf_types=["F16"])
    assert type(caught.value).__name__ == "StageError" and not (run_dir / "export").exists()


@pytest.mark.export
def test_an_architecture_that_llama_cpp_does_not_know(finished_run, tmp_path):
    run_dir = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config = run_dir / "merged" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM"))
    with pytest.raises(Exception, match=r"llama\.cpp cannot convert .*NoSuchForCausalLM") as caught:
        export_run(run_dir, gguf_types=["F16"])
    assert type(caught.value).__name__ == "StageError" and "\n" not in str(caught.value)
    with pytest.raises(Exception, match="does not know 'Q9_9'"):
        export_run(run_dir, gguf_types=["Q9_9"])


@pytest.mark.parametrize("target", ["export", "chat"])
def test_a_misspelt_parameter_of_make(target, tmp_path):
    """With stand-ins for what make would install first."""
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", "llama-cpp-python-0.3.36", "gradio-6.20.0"):
        (tmp_path / name).touch()
    done = make(target, f"EXTRAS={tmp_path}", "PROFILE=tiny", f"RUN_DIR={tmp_path}", "ARGS=-p max_new_token 8")
    assert done.returncode != 0
    assert "No notebook has a parameter 'max_new_token'. Did you mean 'max_new_tokens'?" in done.stderr
