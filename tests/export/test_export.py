"""Notebook 7: model cards, upload, the Ollama template, and (`make test-export`) the same model in llama.cpp."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import base_models
import pytest
import torch
import yaml
from conftest import ROOT, copy_of, make, run_script
from datasets import Dataset
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_encoding import sentencepiece as llama_vocabulary  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from tabletune.chat.encoding import encode, encode_prompt
from tabletune.chat.templates import render
from tabletune.chat.tokenizer import load_tokenizer, save_tokenizer
from tabletune.errors import StageError
from tabletune.evaluation import scoring
from tabletune.export import cards as cards_module
from tabletune.export import gguf, llama_cpp, ollama, verification
from tabletune.model.loading import load_model
from tabletune.run.parameters import PARAMETERS
from tabletune.run.stage import Stage

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
COUNTED = "{% for message in messages %}{{ loop.index }}: {{ message['content'] }} ({{ messages | length }}){% endfor %}"
SYSTEM = {"role": "system", "content": 'Be "brief" & {{ kind }}.\nTwo lines.'}
ASKED = {"role": "user", "content": "What helps with a cold?"}
ANSWERED = {"role": "assistant", "content": "**Tea** <hot>, 'sweet'.\n\n- ümlaut 🍵"}
CONVERSATIONS = [
    [ASKED],
    [ASKED, ANSWERED, ASKED],
    [SYSTEM, ASKED],
    [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED, ASKED],
]
TEMPLATES = pytest.mark.parametrize(
    "template", [CHATML, LLAMA2, NO_SYSTEM], ids=["ChatML", "Llama 2", "no system"]
)


def renderer(template):
    def refuse(message):
        raise TemplateError(message)

    compiled = ImmutableSandboxedEnvironment().from_string(template)
    known = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "raise_exception": refuse,
        "add_generation_prompt": True,
    }
    return lambda messages: compiled.render(messages=messages, **known)


@TEMPLATES
def test_a_template_taken_apart_goes_together_again(template):
    render = renderer(template)
    texts = ollama.take_apart(render)
    assert (("", "system") in texts) == (template != NO_SYSTEM)
    for messages in CONVERSATIONS[: 2 if template == NO_SYSTEM else 4]:
        assert ollama.put_together(texts, messages) == render(messages)


@pytest.mark.parametrize("template", [LAST_ONLY, COUNTED], ids=["last only", "counted"])
def test_a_template_that_is_more_than_texts_is_refused(template):
    with pytest.raises(
        ValueError, match=r"leaves out messages or repeats them|more than put texts"
    ):
        ollama.take_apart(renderer(template))


def modelfile_of(template, **more):
    """The Modelfile of a run of that template, and Ollama's template in it."""
    tokenizer = SimpleNamespace(decode=lambda ids: {2: "</s>", 7: "<|im_end|>"}[ids[0]])
    told = SimpleNamespace(window=1024, max_new_tokens=99, license="mit")
    found = {
        "disclaimer": 'Do not "trust" it.',
        "name": "herbs",
        "stops": [2, 7],
        "tokenizer": tokenizer,
        "told": told,
    }
    found |= {
        "base_on_hub": None,
        "base_model": "/home/me/base",
        "report": {"system_prompt": ""},
        **more,
    }
    text = ollama.modelfile(
        SimpleNamespace(**found), "herbs-F16.gguf", ollama.take_apart(renderer(template))
    )
    return text, re.search('TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]


@pytest.mark.export
@TEMPLATES
def test_ollamas_template_renders_the_same_in_go(template, tmp_path):
    """The template that goes into the Modelfile, run by Go's own text/template, the engine of Ollama."""
    import go_template

    render = renderer(template)
    (tmp_path / "t").write_text(modelfile_of(template)[1], encoding="utf-8")
    for messages in CONVERSATIONS[: 2 if template == NO_SYSTEM else 4]:
        values = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        (tmp_path / "v.yml").write_text(
            yaml.safe_dump(values, allow_unicode=True), encoding="utf-8"
        )
        go_template.render_template(
            str(tmp_path / "t"), str(tmp_path / "v.yml"), str(tmp_path / "out")
        )
        assert (tmp_path / "out").read_text(encoding="utf-8") == render(messages)


def test_the_modelfile_says_the_stops_the_system_message_and_the_disclaimer():
    text, _ = modelfile_of(LLAMA2)
    assert re.findall("PARAMETER stop (.*)", text) == ['"</s>"', '"<|im_end|>"']
    assert text.count('Do not "trust" it.') == 2 and "SYSTEM" not in text and "/home/me" not in text
    assert "FROM ./herbs-F16.gguf" in text and "num_ctx 1024" in text and "num_predict 99" in text
    text, _ = modelfile_of(LLAMA2, report={"system_prompt": "You are brief."})
    assert '\nSYSTEM """You are brief."""\n' in text


@pytest.fixture
def run_dir(finished_run, tmp_path):
    return copy_of(
        finished_run,
        tmp_path / "run",
        "dataset",
        "adapter",
        "merged",
        "training",
        "evaluation",
        "manifest.json",
    )


def read(run_dir, **parameters):
    """What `cards_module.open_finished` finds in a run folder, with some parameters of the notebook."""
    told = {**PARAMETERS["07_export"], "run_dir": str(run_dir), "gguf_types": [], **parameters}
    return cards_module.open_finished(Stage("07_export", run_dir, told))


def cards_of(run_dir, **parameters):
    """Run the notebook without llama.cpp. Returns the cards as the Hub reads them."""
    run_script("07_export", run_dir=str(run_dir), gguf_types=[], **parameters)
    parts = ("adapter", "merged")
    return {
        p: ModelCard.load(run_dir / "export" / p / "README.md", ignore_metadata_errors=False)
        for p in parts
    }


def test_the_cards_say_what_the_run_says(run_dir):
    cards = cards_of(
        run_dir, license="apache-2.0", base_model_on_hub="some-one/tiny", tags="herbs, tea"
    )
    report = json.loads((run_dir / "dataset" / "report.json").read_text())
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    value, (low, high) = (
        metrics["merged"]["perplexity"][name] for name in ("response", "response_ci95")
    )
    for part, card in cards.items():
        known = card.data.to_dict()
        assert known["license"] == "apache-2.0" and known["language"] == ["en"]
        assert known["base_model"] == "some-one/tiny" and known["pipeline_tag"] == "text-generation"
        assert {"herbs", "tea", part} <= set(known["tags"])
        assert known["library_name"] == ("peft" if part == "adapter" else "transformers")
        assert "datasets" not in known, "the table is a file here"
        for text in (
            f"{value:,.1f} ({low:,.1f} – {high:,.1f})",
            f"{report['rows_in']} rows came in and {report['rows_out']} stayed",
            *(f"| {reason} | {rows} |" for reason, rows in report["dropped"].items()),
            report["fingerprint"],
            "| lora_r | 8 |",
        ):
            assert text in card.text, text
        assert card.text.count("not medical advice") >= 2 and str(ROOT) not in card.content
        assert "{{" not in card.text and "None" not in card.text
    named = json.loads((run_dir / "export" / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "some-one/tiny"
    assert "07_export" in json.loads((run_dir / "manifest.json").read_text())


def test_a_card_runs_as_it_says(run_dir):
    """The code in it, with the folder for the repository's name, answers a question of the test split."""
    card = cards_of(run_dir, max_new_tokens=3)["merged"]
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1].replace(
        '"run"', repr(str(run_dir / "merged"))
    )
    scope = {}
    exec(compile(code, "card", "exec"), scope)
    asked = encode_prompt(scope["messages"], scope["tokenizer"])
    assert (
        scope["answer"].shape == (1, len(asked) + 3)
        and scope["answer"][0, : len(asked)].tolist() == asked
    )


def test_the_card_takes_all_figures_that_notebook_5_may_have(run_dir):
    both = {"prompts": 40, "seeks_help": 0.25, "seeks_help_ci95": [0.1, 0.4], "offers_remedy": 0.9}
    trust = {
        "by_split": {"train": {"response": 3.21, "response_ci95": [3.1, 3.3], "rows": 9}},
        "outside": {"perplexity": 12.34, "ci95": [11, 13]},
        "safety": {"emergency": {**both, "offers_remedy_ci95": [0.8, 0.95]}, "everyday": both},
        "grounding": {
            "named": 17,
            "this_condition": 0.5,
            "this_condition_ci95": [0.3, 0.7],
            "nowhere": 0.25,
        },
    }
    assert "Safety" not in cards_of(run_dir)["merged"].text
    (run_dir / "trust").mkdir()
    metrics = {
        **dict.fromkeys(("base", "adapter", "merged"), trust),
        "fidelity": {},
        "differences": {},
    }
    (run_dir / "trust" / "metrics.json").write_text(json.dumps(metrics))
    text = cards_of(run_dir)["merged"].text
    for figure in (
        "3.21 (3.10 – 3.30)",
        "12.34 (11.00 – 13.00)",
        "90% (80% – 95%)",
        "| 17 | 50% (30% – 70%) | – | 25% |",
    ):
        assert figure in text, figure
    assert "40 questions that were emergencies it offered a remedy in 90%" in text


def test_a_table_of_ones_own_gets_no_word_about_health(run_dir):
    """Nor one whose rows were too few for intervals, or that asks nothing."""
    path = run_dir / "dataset" / "report.json"
    report = json.loads(path.read_text())
    report |= {
        "example": None,
        "templates": {"question": None, "answer": None, "answer_column": None},
    }
    path.write_text(json.dumps(report))
    path = run_dir / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    for name in ("base", "adapter", "merged"):
        metrics[name]["perplexity"] |= {"response_ci95": None, "full_text_ci95": None}
        metrics[name]["generation"] = None
    path.write_text(json.dumps(metrics))
    text = cards_of(run_dir)["adapter"].text
    assert text.count("Educational example: what the model says may be wrong.") == 2
    assert "too few to say" in text and not re.search("medical|health|emergency", text)


def test_a_data_set_on_the_hub_is_named_with_its_figure(run_dir):
    path = run_dir / "dataset" / "report.json"
    report = json.loads(path.read_text())
    report |= {
        "source": {**report["source"], "dataset": "some-one/remedies"},
        "dataset_commit": "a" * 40,
    }
    path.write_text(json.dumps(report))
    card = cards_of(run_dir)["merged"]
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    expected = metrics["merged"]["perplexity"]["response"]
    assert card.data.datasets == ["some-one/remedies"]
    assert card.data.eval_results[0].metric_value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"push_to_hub": "me/x"},
            "The base model was the folder .*tiny-llama: set base_model_on_hub",
        ),
        ({"push_to_hub": "no owner"}, 'push_to_hub="no owner": use owner/name'),
        ({"base_model_on_hub": "a/b/c"}, 'base_model_on_hub="a/b/c": use owner/name'),
    ],
)
def test_a_bad_name(run_dir, parameters, message):
    with pytest.raises(StageError, match=message) as caught:
        read(run_dir, **parameters)
    assert "\n" not in str(caught.value) and not (run_dir / "export").exists()


@pytest.mark.parametrize(
    ("missing", "first"),
    [
        ("dataset", "01_format"),
        ("adapter", "02_fine"),
        ("merged", "03_merge"),
        ("evaluation", "04_eval"),
    ],
)
def test_an_unfinished_run(run_dir, missing, first):
    shutil.rmtree(run_dir / missing)
    with pytest.raises(StageError, match=f"is missing. Run {first}"):
        read(run_dir)


def test_what_another_model_left_is_set_aside_and_what_this_one_left_stays(run_dir, capsys):
    cards_of(run_dir)
    kept = run_dir / "export" / "merged" / "README.md"
    before = kept.stat().st_mtime_ns
    cards_of(run_dir)
    assert kept.stat().st_mtime_ns == before and "All is done already" in capsys.readouterr().out
    path = run_dir / "merged" / "merge_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_weights": "dequantized"}))
    found = read(run_dir)
    assert not kept.exists() and list(run_dir.glob("earlier/*/export/merged/README.md"))
    assert json.loads((found.folder / "metrics.json").read_text())["base_weights"] == "dequantized"


class Hub:
    """The Hub as a folder that is told what to leave out, and may refuse."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        if repo_id.startswith("refused"):
            raise ValueError("403 Forbidden: you may not write here\nand more")
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        (self.folder / repo_id / "private").write_text(str(private))

    def upload_folder(self, *, repo_id, repo_type, folder_path, ignore_patterns):
        for path in Path(folder_path).iterdir():
            if path.name not in (ignore_patterns or []):
                assert not (self.folder / repo_id / path.name).exists(), (
                    "seen by others as it should not be"
                )
                shutil.copy(path, self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(cards_module, name, getattr(hub, name))
    return hub.folder


def test_both_models_go_to_the_hub(run_dir, hub):
    cards_of(run_dir, base_model_on_hub="some-one/tiny", push_to_hub="me/herbs")
    weights = next((run_dir / "merged").glob("*.safetensors")).name
    for name, file in (("herbs", weights), ("herbs-adapter", "adapter_model.safetensors")):
        assert (hub / "me" / name / "private").read_text() == "True"
        assert (hub / "me" / name / file).exists() and (
            hub / "me" / name / "tokenizer.json"
        ).exists()
        assert ModelCard.load(hub / "me" / name / "README.md").data.base_model == "some-one/tiny"
        assert load_tokenizer(str(run_dir / "merged"))[0].chat_template
        assert f'from_pretrained("me/{name}"' in (hub / "me" / name / "README.md").read_text()
    config = json.loads((hub / "me" / "herbs-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-one/tiny"


def test_a_hub_that_refuses(run_dir, hub):
    with pytest.raises(
        Exception, match="could not go to the Hub as refused/herbs: 403 Forbidden"
    ) as caught:
        cards_of(run_dir, base_model_on_hub="some-one/tiny", push_to_hub="refused/herbs")
    assert type(caught.value).__name__ == "StageError" and "\n" not in str(caught.value)
    assert (run_dir / "export" / "merged" / "README.md").exists()


def test_nothing_is_uploaded_unasked(run_dir, hub):
    cards_of(run_dir)
    assert not hub.exists()


def test_without_llama_cpp_there_are_cards_only(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert llama_cpp.usable_types(["F16"]) == [] and llama_cpp.usable_types([]) == []
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1
        and "llama.cpp is missing here" in said
        and llama_cpp.LLAMA_CPP in said
    )


def test_the_version_of_gguf_is_that_of_the_requirements():
    version = re.search("gguf==(.*)", llama_cpp.EXTRAS)[0]
    assert f"{version}\n" in (ROOT / "requirements.txt").read_text()


# --- the tokenizer that llama.cpp's converter is given


@pytest.fixture
def no_sentencepiece(monkeypatch):
    """A stand-in for the package of that name, with the little of it that is used, where it is not installed."""
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        from transformers.convert_slow_tokenizer import import_protobuf

        package = ModuleType("sentencepiece")
        package.sentencepiece_model_pb2 = import_protobuf()
        monkeypatch.setitem(sys.modules, "sentencepiece", package)


def test_a_sentencepiece_vocabulary_is_written_as_llama_cpp_reads_it(
    no_sentencepiece, run_dir, tmp_path
):
    """With the order of merges, what each token is, and none that the model has no embedding for."""
    from transformers.convert_slow_tokenizer import import_protobuf

    path = run_dir / "merged" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    beyond = {**state["added_tokens"][-1], "id": 2048, "content": "<pad>"}
    path.write_text(
        json.dumps({**state, "added_tokens": [*state["added_tokens"], beyond]}), encoding="utf-8"
    )
    gguf.prepare(run_dir / "merged", tmp_path, True)
    model = import_protobuf().ModelProto()
    model.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    kind, pieces = model.SentencePiece, {piece.piece: piece for piece in model.pieces}
    assert len(model.pieces) == 2048 and "<pad>" not in pieces
    assert "<pad>" not in (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert [pieces[t].type for t in ("<unk>", "<s>", "<0x0A>")] == [
        kind.UNKNOWN,
        kind.CONTROL,
        kind.BYTE,
    ]
    order = ["".join(pair) for pair in state["model"]["merges"]]
    scores = [pieces[token].score for token in dict.fromkeys(order)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_a_vocabulary_of_bytes_is_not_taken_for_sentencepiece(run_dir, tmp_path):
    path = run_dir / "merged" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "pre_tokenizer": {"type": "ByteLevel"}}), encoding="utf-8")
    gguf.prepare(run_dir / "merged", tmp_path, False)
    assert not (tmp_path / "tokenizer.model").exists()
    assert (
        json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"][
            "byte_fallback"
        ]
        is False
    )


# --- in llama.cpp itself


@pytest.mark.export
def test_the_same_model_in_llama_cpp(finished_run, tmp_path):
    """`make export` on the tiny model, whose tokenizer is of Llama 2's kind: tokens, answers, perplexity, files."""
    run_dir = copy_of(finished_run, tmp_path / "run")
    told = "ARGS=-p proof_rows 8 -p proof_questions 2 -p max_new_tokens 24"
    done = make("export", f"RUN_DIR={run_dir}", told)
    assert done.returncode == 0, done.stderr[-2000:]
    exported = json.loads((run_dir / "export" / "metrics.json").read_text())
    assert exported["F16"]["same_answers"] == exported["F16"]["questions"] == 2
    assert exported["F16"]["ratio_to_merged"] == pytest.approx(1, abs=2e-4)
    sizes = [exported[name]["mib"] for name in ("merged", "F16", "Q8_0", "Q4_K_M")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    half = exported["F16"]["perplexity"]["response"]
    for kind in ("Q8_0", "Q4_K_M"):
        assert exported[kind]["perplexity"]["response"] == pytest.approx(half, rel=0.02)
        assert exported[kind]["perplexity"]["response"] != half
    modelfile = (run_dir / "export" / "gguf" / "Modelfile").read_text()
    assert "FROM ./run-Q4_K_M.gguf" in modelfile and 'PARAMETER stop "</s>"' in modelfile
    assert modelfile.count("not medical advice") == 2
    files = {path: path.stat().st_mtime_ns for path in (run_dir / "export").rglob("*.*")}
    assert make("export", f"RUN_DIR={run_dir}", told).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "export").rglob("*.*")} == files


@pytest.mark.export
def test_answers_in_transformers_are_greedy_whatever_the_base_prefers(run_dir):
    """A generation config that samples and punishes repetition, as many bases bring one, changes nothing."""
    told = {"proof_rows": 6, "proof_questions": 2, "max_new_tokens": 12}
    path = run_dir / "merged" / "generation_config.json"
    own = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 2.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    found = read(run_dir, gguf_types=["F16"], **told)
    files = {"F16": gguf.make_gguf(found, "F16")}
    assert verification.prove_files(found, files)["F16"]["same_answers"] == 2


@pytest.mark.export
def test_without_the_order_of_merges_llama_cpp_would_read_other_tokens(run_dir, monkeypatch):
    """What `sentencepiece_model` is for, and that the comparison of tokens sees it."""
    whole = gguf.sentencepiece_model
    flat = lambda state, rows: whole({**state, "model": {**state["model"], "merges": []}}, rows)  # noqa: E731
    monkeypatch.setattr(gguf, "sentencepiece_model", flat)
    found = read(run_dir, gguf_types=["F16"])
    file = gguf.make_gguf(found, "F16")
    with pytest.raises(StageError, match="into other tokens than training"):
        gguf.check_tokens(found, file)
    assert not file.exists()


@pytest.mark.export
def test_tokens_beyond_the_vocabulary_are_no_hindrance(run_dir):
    """A <pad> that the model has no embedding for, as the Hub's copy of Llama 2 has had."""
    path = run_dir / "merged" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["added_tokens"].append({**state["added_tokens"][-1], "id": 2048, "content": "<pad>"})
    path.write_text(json.dumps(state), encoding="utf-8")
    found = read(run_dir, gguf_types=["F16"])
    assert gguf.check_tokens(found, gguf.make_gguf(found, "F16")) > 100


@pytest.mark.export
def test_a_prompt_of_ollama_that_is_another_is_not_kept(run_dir, monkeypatch):
    found = read(run_dir, gguf_types=["F16"])
    file = gguf.make_gguf(found, "F16")
    asked = cards_module.questions(found)
    text = ollama.write_modelfile(found, file, asked)
    assert text == file.with_name("Modelfile").read_text() and len(asked) == 5
    together = ollama.put_together
    changed = lambda texts, messages: together(texts, messages).replace(asked[0][0]["content"], "x")  # noqa: E731
    monkeypatch.setattr(ollama, "put_together", changed)
    monkeypatch.setattr(
        ollama, "take_apart", lambda _: {("", "user"): "[INST] ", ("user", ""): " [/INST]"}
    )
    with pytest.raises(StageError, match="is not the training's"):
        ollama.write_modelfile(found, file, asked)


@pytest.mark.export
def test_a_real_vocabulary_of_llamas_kind(llama_vocabulary, tmp_path):  # noqa: F811
    """Cut alike in llama.cpp, hard texts too, from a tokenizer.json alone."""
    folder = llama_vocabulary()
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).half().save_pretrained(folder)
    tokenizer, stops = load_tokenizer(str(folder))
    save_tokenizer(folder, tokenizer, stops)
    hard = [
        "\n \n\n\t x",
        "Hello,  y'all! 3 33 333 3.3",
        "🚀 👩‍🌾 កាន់តែ Ünï نص",
        "[INST] <<SYS>> def f(x):\n    return 'a'",
        "  a",
        "ą̂\u3000b",
    ]
    rows = [
        {"prompt": [ASKED], "completion": [{"role": "assistant", "content": text}]} for text in hard
    ]
    found = SimpleNamespace(
        merged=folder, folder=tmp_path, name="real", tokenizer=tokenizer, stops=stops
    )
    found.splits = {"train": Dataset.from_list(rows)}
    file = gguf.make_gguf(found, "F16")
    assert gguf.check_tokens(found, file) == len(hard)
    ids = llama_cpp.InLlamaCpp(file).cut(render([ASKED], tokenizer), "<s>")
    assert ids == encode_prompt([ASKED], tokenizer) and ids[:3] == [1, 733, 16289]


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "r1", "phi3", "gemma3", "mistral3"])
def test_kinds_of_models(name, tmp_path):
    """Tied, experts, tokens that are not special, those that swallow white space, a multimodal one: the same there."""
    merged = shutil.copytree(base_models.cached(name), tmp_path / "merged")
    if name == "phi3":  # as Microsoft's
        state = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
        for token in state["added_tokens"]:
            token["rstrip"] = re.fullmatch(r"<\|(?!endoftext).*", token["content"]) is not None
        (merged / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    tokenizer, stops = load_tokenizer(str(merged))
    save_tokenizer(merged, tokenizer, stops)
    rows = [{"prompt": asked, "completion": [ANSWERED]} for asked in CONVERSATIONS[:2]]
    found = SimpleNamespace(
        merged=merged, folder=tmp_path, name="x", tokenizer=tokenizer, stops=stops
    )
    found.splits = {"train": Dataset.from_list(rows)}
    file = gguf.make_gguf(found, "F16")
    assert gguf.check_tokens(found, file) == 2
    encoded = [encode(row, tokenizer, stops) for row in rows]
    pair = load_model(merged, None, torch.float32), llama_cpp.InLlamaCpp(file, 256)
    scores = [scoring.score(model, encoded, tokenizer.pad_token_id, 1, 256, 128) for model in pair]
    one, other = (scoring.perplexity(table, "response") for table in scores)
    assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.export
def test_an_architecture_that_llama_cpp_does_not_know(run_dir):
    config = run_dir / "merged" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM"))
    found = read(run_dir, gguf_types=["F16"])
    with pytest.raises(
        StageError, match=r"llama\.cpp cannot convert .*NoSuchForCausalLM"
    ) as caught:
        gguf.make_gguf(found, "F16")
    assert "\n" not in str(caught.value) and not list((found.folder / "gguf").iterdir())
    with pytest.raises(StageError, match="does not know 'Q9_9'"):
        llama_cpp.usable_types(["Q9_9"])


@pytest.mark.parametrize("target", ["export", "chat"])
def test_a_misspelt_parameter_of_make(target, tmp_path):
    done = make(target, f"RUN_DIR={tmp_path}", "ARGS=-p max_new_token 8")
    assert done.returncode != 0
    assert "parameter 'max_new_token'. Did you mean 'max_new_tokens'?" in done.stderr
