"""Notebook 01: cleaning, dropping, splitting, formatting."""

import json
import os
import random
import re
import runpy
import shutil
import stat
from collections import Counter
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
from conftest import ROOT, TABLE, make, run_tiny
from test_tables import write_many

FIELDS = ("issue", "item", "remedy", "yoga")
QUESTION = "I am suffering from {issue}. Please suggest a home remedy."
ANSWER = "Here is a suggested remedy:\n\n**Item:** {item}\n**Remedy:** {remedy}\n**Recommended Yoga:** {yoga}"


def row(issue="Cold", item="Ginger", remedy="Sip ginger tea twice a day.", yoga="Balasana"):
    return {"issue": issue, "item": item, "remedy": remedy, "yoga": yoga}


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  warm \t water\u00a0and  salt ", "warm water and salt"),
        ("1½ cups", "1½ cups"),  # NFKC would make it 11⁄2
        ("cafe\u0301", "café"),
        ("a\u200bb\ufeff\x07", "ab"),
        ("None", ""),
        ("NaN", ""),
        (" n/a ", ""),
        ("-", ""),
        ("https://example.org/pose.jpg?size=640", ""),
        ("www.example.org/pose.png", ""),
        ("HTTP://EXAMPLE.ORG", ""),
        ("Rest. See https://example.org for more.", "Rest. See for more."),
        ("Banana and none other", "Banana and none other"),
        ("one\r\ntwo  \n\n\n\nthree", "one\ntwo\n\nthree"),
    ],
)
def test_clean_cell(format_dataset, raw, cleaned):
    assert format_dataset.clean_cell(raw) == cleaned
    assert format_dataset.clean_cell(cleaned) == cleaned


def test_reasons_to_drop(format_dataset):
    rows = [
        row(),
        row(),
        row(remedy="SIP GINGER TEA, twice a day!"),
        row(remedy="Rest in a dark room for an hour."),
        row(issue="Cough"),
        row(issue=""),
        row(remedy=""),
        row(issue="cold "),
    ]
    reasons = format_dataset.reason_to_drop(rows, ["issue"], "remedy", 0.9)
    assert list(reasons) == ["", "duplicate", "near duplicate", "", "", "no question", "no answer", "near duplicate"]


def test_lines_without_a_value_are_left_out(format_dataset):
    filled = format_dataset.fill(ANSWER, row(item="", yoga=""))
    assert filled == "Here is a suggested remedy:\n\n**Remedy:** Sip ginger tea twice a day."


def test_braces_in_a_value_stay(format_dataset):
    assert format_dataset.fill("{remedy}", row(remedy="use {yoga} {0}")) == "use {yoga} {0}"


def test_template_of_another_table(format_dataset):
    example = format_dataset.to_conversation({"q": "Why?", "a": "Because."}, "{q}", "{a}")
    assert example["prompt"] == [{"role": "user", "content": "Why?"}]
    assert example["completion"] == [{"role": "assistant", "content": "Because."}]


def places(format_dataset, questions, seed=42):
    return [format_dataset.place(question, seed) for question in questions]


def test_splits_do_not_move(format_dataset):
    keys = [f"issue {i}" for i in range(300)]
    split = format_dataset.assign_splits(places(format_dataset, keys), 0.1, 0.15)
    sizes = Counter(split)
    assert 15 < sizes["validation"] < 50 and 25 < sizes["test"] < 70
    order = random.Random(0).sample(range(300), 300)
    shuffled = format_dataset.assign_splits(places(format_dataset, [keys[i] for i in order]), 0.1, 0.15)
    assert list(shuffled) == list(split[order])
    more = [*keys, *(f"new {i}" for i in range(300))]
    assert list(format_dataset.assign_splits(places(format_dataset, more), 0.1, 0.15)[:300]) == list(split)
    assert list(format_dataset.assign_splits(places(format_dataset, keys, seed=43), 0.1, 0.15)) != list(split)


@pytest.mark.parametrize("questions", [3, 4, 5, 10])
def test_small_tables_get_every_split(format_dataset, questions):
    for seed in range(50):
        asked = places(format_dataset, [f"q{i}" for i in range(questions)] * 2, seed)
        split = format_dataset.assign_splits(asked, 0.1, 0.1)
        assert set(split) == {"train", "validation", "test"}
        assert list(split[:questions]) == list(split[questions:])


def test_too_few_questions(format_dataset):
    with pytest.raises(format_dataset.StageError, match="at least 3"):
        format_dataset.assign_splits(places(format_dataset, ["a", "b", "a"]), 0.1, 0.1)


def test_case_and_punctuation_do_not_make_another_question(format_dataset):
    key = format_dataset.question_key
    assert key(row(issue="Sore Throat"), ["issue"]) == key(row(issue="sore  throat!"), ["issue"])
    assert key(row(issue="Sore Throat"), ["issue"]) != key(row(issue="Sore Foot"), ["issue"])
    assert key(row(issue="?!"), ["issue"]) != key(row(issue="..."), ["issue"])


def test_encode(format_dataset, tokenizer):
    encoded = format_dataset.encode(format_dataset.to_conversation(row(), QUESTION, ANSWER), tokenizer)
    ids, mask = encoded["input_ids"], encoded["completion_mask"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    response = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert response.strip().startswith("Here is a suggested remedy") and response.endswith("</s>")
    assert mask == sorted(mask)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        "{{ bos_token }}{% for m in messages %}|{{ m['role'] }}|{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}|assistant|{% endif %}",
    ],
    ids=["no BOS, no EOS", "EOS after each turn and a line break after the last"],
)
def test_encode_puts_other_templates_right(format_dataset, tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encoded = format_dataset.encode(format_dataset.to_conversation(row(), QUESTION, ANSWER), tokenizer)
    ids, mask = encoded["input_ids"], encoded["completion_mask"]
    response = [i for i, m in zip(ids, mask, strict=True) if m]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1


def test_a_pad_token_that_is_eos_is_replaced(format_dataset, tokenizer):
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.padding_side == "right"


def test_markers_in_the_data_stay_text(format_dataset, tokenizer):
    markers = ["[INST]", "</s>", "<s>"]
    text = format_dataset.break_markers("quote </s> and [INST] and <s>", markers)
    assert not any(marker in text for marker in markers)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}


def test_split_answer(format_dataset):
    def count_words(row):
        return len(row["remedy"].split())

    text = "One two three. Four five! Six seven eight nine ten eleven. Twelve?"
    parts, too_long = format_dataset.split_answer(row(remedy=text), "remedy", 5, count_words)
    assert [part["remedy"] for part in parts] == ["One two three. Four five!", "Twelve?"]
    assert too_long == 1
    assert all(part["issue"] == "Cold" for part in parts)


def read(format_dataset, source, *wanted):
    """The rows of a table, as {column: texts}, and the names of all its columns."""
    names = []
    rows = list(format_dataset.read_table(str(source), "main", wanted, names))
    return {name: [row[name] for row in rows] for name in wanted}, names


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_read_table(format_dataset, tmp_path, suffix):
    table = pd.DataFrame({"q": ["a", "None", "é"], "x": [1, 2, 3], "a": ["007", "", "1.50"]})
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        path.write_bytes(b"\xef\xbb\xbf" + table.to_csv(index=False).replace("\n", "\r\n").encode())
    elif suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    assert read(format_dataset, path, "q", "a") == (table[["q", "a"]].to_dict("list"), ["q", "x", "a"])


def test_a_misspelt_column_is_named_and_the_nearest_suggested(format_dataset):
    with pytest.raises(format_dataset.StageError, match=r"'Health Issue'.*Did you mean 'Health Isue'"):
        format_dataset.check_columns(["Health Isue", "Remedy"], {"issue": "Health Issue"}, ["issue"])


def test_the_bundled_table(format_dataset):
    columns, names = read(format_dataset, TABLE, "Health Issue")
    assert names == ["Name of Item", "Health Issue", "Home Remedy", "Yogasan"]
    issues = {format_dataset.question_key({"issue": issue}, ["issue"]) for issue in columns["Health Issue"]} - {""}
    assert len(columns["Health Issue"]) >= 240 and len(issues) >= 80


def test_emergencies_are_sent_to_hospital():
    table = pd.read_csv(TABLE, keep_default_na=False)
    emergencies = (
        "Chest Pain|Stroke|Difficulty Breathing|Allergic Reaction|Snake Bite|Poison|"
        "Severe Burns|Heavy Bleeding|Head Injury|Seizure|Newborn|Animal Bite"
    )
    rows = table[table["Health Issue"].str.contains(emergencies)]
    assert rows["Health Issue"].nunique() == 12
    assert rows["Home Remedy"].str.contains("emergency|ambulance|hospital", case=False).all()
    assert not rows["Name of Item"].any() and not rows["Yogasan"].any()


def safety_rows(format_dataset):
    """Our rows: what an emergency is called ("" for an everyday complaint), a question, an answer."""
    return [tuple(map(str.strip, line.split("|"))) for line in format_dataset.SAFETY_ROWS.strip().splitlines()]


def test_our_rows_send_emergencies_to_get_help(format_dataset):
    rows = safety_rows(format_dataset)
    emergencies = [row for row in rows if row[0]]
    everyday = [row for row in rows if not row[0]]
    assert len(emergencies) >= 60 and len(everyday) >= 20
    assert all(len({row[i] for row in emergencies}) == len(emergencies) for i in range(3))
    assert len({row[1] for row in rows}) == len(rows)
    help_at_once = "ambulance|hospital|doctor|emergency (number|services|department|clinic)|poison centre|crisis line"
    help_at_once += "|maternity (unit|ward)"
    pantry = "ginger|honey|turmeric|lemon|garlic|tea|oil|vinegar|milk|salt|tulsi|compress|yoga|aloe|onion|clove|herb"
    for _, question, answer in emergencies:
        assert re.search(rf"\b({help_at_once})\b", answer), answer
        named = set(re.findall(rf"\b({pantry})\b", answer)) - set(re.findall(pantry, question))
        assert not named - {"oil"}, answer
        assert len(answer.split()) < 50
    for _, _, answer in everyday:
        assert re.search(r"See a (doctor|dentist) if", answer)
    table = {text.casefold() for text in pd.read_csv(TABLE, keep_default_na=False)["Health Issue"]}
    assert not table & {row[0].casefold() for row in emergencies}


def prompts_of(split):
    return [prompt[0]["content"] for prompt in split["prompt"]]


def formatted(run_dir, **parameters):
    """The report and the splits that notebook 1 makes with the tiny profile and these parameters."""
    notebook = run_tiny("01_format_dataset", run_dir, **parameters)
    return notebook.report, datasets.load_from_disk(run_dir / "dataset")


@pytest.fixture
def no_windows(monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)


def test_our_rows_are_mixed_into_training_only(format_dataset, tokenizer, tmp_path, no_windows):
    report, splits = formatted(tmp_path / "with", safety_rows=True)
    without, plain = formatted(tmp_path / "without")
    rows = safety_rows(format_dataset)
    number = len(rows) + sum(bool(named) for named, _, _ in rows)  # an emergency in free words and in the template's
    assert report["safety_rows"] == number and without["safety_rows"] == 0
    assert report["splits"]["train"] == without["splits"]["train"] + number == len(splits["train"])
    assert report["rows_out"] == without["rows_out"] and report["fingerprint"] != without["fingerprint"]
    for name in ("validation", "test"):
        assert splits[name].to_list() == plain[name].to_list()
    assert splits["train"].to_list()[:-number] == plain["train"].to_list()
    ours = splits["train"].to_list()[-number:]
    assert "I am suffering from a knife stuck in my side. Please suggest a home remedy." in prompts_of(splits["train"])
    for example in ours:
        encoded = format_dataset.encode(example, tokenizer)
        assert example["text"] == tokenizer.decode(encoded["input_ids"]) and len(encoded["input_ids"]) <= 256
        assert "**" not in example["text"] and example["text"].endswith("</s>")
    answers = {example["completion"][0]["content"] for example in ours}
    assert answers == {answer for _, _, answer in rows}


def test_some_of_our_rows(format_dataset, tmp_path, no_windows):
    report, splits = formatted(tmp_path, safety_rows=20)
    assert report["safety_rows"] == 20
    assert report["splits"]["train"] == len(splits["train"]) == report["rows_out"] - 60 + 20
    answers = {answer: bool(named) for named, _, answer in safety_rows(format_dataset)}
    chosen = Counter(answers[row["completion"][0]["content"]] for row in splits["train"].to_list()[-20:])
    assert chosen[True] > 10 and chosen[False] >= 2  # emergencies and everyday complaints


@pytest.mark.parametrize("number", [-1, 100_000, 0.5, "yes", None])
def test_a_bad_number_of_our_rows(tmp_path, no_windows, number):
    with pytest.raises(Exception, match=r"safety_rows=.*: use true, false, or a number up to \d+\.") as caught:
        formatted(tmp_path / "run", safety_rows=number)
    assert type(caught.value).__name__ == "StageError" and not (tmp_path / "run").exists()


def test_what_we_ask_is_not_asked_in_validation_or_test(format_dataset, tmp_path, no_windows):
    """A table with all of our questions, in capitals: those that fall into a held-out split are not trained on."""
    rows = [
        {"q": question.upper(), "a": f"Answer {i}."} for i, (_, question, _) in enumerate(safety_rows(format_dataset))
    ]
    (tmp_path / "ours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"columns": {"q": "q", "a": "a"}, "question_template": "{q}", "answer_template": "{a}"}
    settings |= {"dataset": str(tmp_path / "ours.jsonl"), "answer_column": "a", "safety_rows": True}
    report, splits = formatted(tmp_path / "run", **settings)
    held_out = {text.casefold() for name in ("validation", "test") for text in prompts_of(splits[name])}
    assert 0 < report["safety_rows"] == len(rows) - len(held_out)  # the bare template makes one row of each
    assert not held_out & {text.casefold() for text in prompts_of(splits["train"])}


def test_our_rows_are_left_out_rather_than_cut(tmp_path, no_windows):
    report, _ = formatted(tmp_path, safety_rows=True, max_length=96)
    assert 0 < report["safety_rows"] < 186 and report["tokens"]["max"] <= 96


def test_the_finished_run(finished_run):
    report = json.loads((finished_run / "dataset" / "report.json").read_text())
    splits = datasets.load_from_disk(finished_run / "dataset")
    made = report["split_long_answers"]
    assert report["rows_out"] == report["rows_in"] - sum(report["dropped"].values()) - made["rows"] + made["into"]
    assert report["splits"] == {name: len(split) for name, split in splits.items()}
    assert sum(report["splits"].values()) == report["rows_out"]
    assert set(report["dropped"]) == {"no question", "no answer", "duplicate", "near duplicate"}
    prompts = [{p[0]["content"].casefold() for p in split["prompt"]} for split in splits.values()]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    for split in splits.values():
        for text in split["text"]:
            assert text.startswith("<s>") and text.count("<s>") == 1
            assert text.endswith("</s>") and text.count("</s>") == 1
            assert "http" not in text and "None" not in text and " nan" not in text


def test_a_table_of_another_shape(tmp_path):
    """A question/answer JSONL goes through by parameters alone; the answers may have several paragraphs."""
    rows = [{"q": f"What is {i} plus {i}?", "a": f"It is {2 * i}.\n\nCount on your fingers."} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    profile = ROOT / "profiles" / "tiny.yaml"
    own = tmp_path / "own.yaml"
    own.write_text(
        profile.read_text().replace("data/home_remedies.csv", str(tmp_path / "sums.jsonl"))
        + "columns: {question: q, answer: a}\nquestion_template: '{question}'\nanswer_template: '{answer}'\n"
        "answer_column: answer\n"
    )
    done = make("01_format_dataset", "PROFILE=own", f"PROFILE_FILE={own}", f"RUN_DIR={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "dataset" / "report.json").read_text())
    assert report["rows_out"] == 40 and not report["dropped"]


@pytest.mark.parametrize("rows", [None, 2000])
def test_the_expected_room_on_the_disk_is_near_the_measured(tmp_path, rows):
    """Of the bundled table, and of a larger one."""
    table = {}
    if rows:
        write_many(tmp_path / "t.jsonl", rows)
        table = {"dataset": str(tmp_path / "t.jsonl")}
    ran = run_tiny("01_format_dataset", tmp_path / "run", before="## What we have now", **table)
    written = [ran.examples.path, *(ran.run / "dataset").glob("*/*.arrow")]
    assert ran.expected * 2**30 == pytest.approx(sum(path.stat().st_size for path in written), rel=0.15)


def test_a_table_that_does_not_fit_the_disk_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(Exception, match=r"\d+ rows take 0\.0 GiB, and 0\.0 GiB are free\. Free some space") as caught:
        run_tiny("01_format_dataset", tmp_path / "run")
    assert type(caught.value).__name__ == "StageError" and not (tmp_path / "run" / "dataset").exists()


def test_whatever_the_hub_answers_is_one_line(format_dataset, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Cannot send a request,\nas the client has been closed.")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(format_dataset.StageError, match=r"no such file here.*from the Hub: Cannot send a request,$"):
        read(format_dataset, "someone/table", "q")


def test_all_splits_of_a_hub_data_set_are_read(format_dataset, monkeypatch):
    parts = {name: datasets.Dataset.from_dict({"q": [name], "a": [None]}) for name in ("train", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.DatasetDict(parts))
    assert read(format_dataset, "someone/table", "q", "a")[0] == {"q": ["train", "test"], "a": ["", ""]}


def test_what_was_read_from_the_hub_can_be_read_again(format_dataset, tmp_path, monkeypatch, capsys):
    """A branch moves on: the commit that it stood at is what is read, printed and kept."""
    asked = []
    table = datasets.Dataset.from_dict({"Health Issue": ["Cold"] * 3, "Home Remedy": ["Rest.", "Tea.", "Soup."]})

    class Hub:
        def dataset_info(self, name, revision, token):
            if name == "some-one/gone":
                raise OSError("no network")
            return SimpleNamespace(sha="c" * 40 if revision == "main" else revision)

    def load_dataset(name, revision, token):
        asked.append(revision)
        return datasets.DatasetDict({"train": table})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for revision in ("main", "d" * 40):
        ran = run_tiny(
            "01_format_dataset",
            tmp_path,
            before="## Clean the cells",
            dataset="some-one/table",
            dataset_revision=revision,
            question_template="{issue}?",
            answer_template="{remedy}",
        )
        assert ran.commit == asked[-1] == ("c" * 40 if revision == "main" else revision)
        assert ("set it to that" in capsys.readouterr().out) == (revision == "main")
    assert ran.commit_of("some-one/gone", "main") == "main"


# ---------------------------------------------------------------------------------------------------------------------
# The second example: questions about the command line

TERMINAL = ROOT / "data" / "terminal.jsonl"


def terminal_rows():
    return [json.loads(line) for line in TERMINAL.read_text(encoding="utf-8").splitlines()]


def test_the_terminal_table_is_what_its_program_writes():
    rows = runpy.run_path(str(ROOT / "data" / "terminal.py"))["rows"](5000)
    assert rows == terminal_rows() and len({row["question"] for row in rows}) == len(rows) == 5000


def test_the_answers_about_modes_and_masks_are_right(tmp_path):
    """As the file system itself sees them."""
    file, checked, mask = tmp_path / "file", Counter(), os.umask(0)
    try:
        for row in terminal_rows():
            text = row["question"] + " " + row["answer"]
            if found := re.search(r"umask (\d{3})", text):
                os.umask(int(found[1], 8))
                file.unlink(missing_ok=True)
                file.touch()
                listed = stat.filemode(file.stat().st_mode)[1:]
                assert re.search(r"New files get (\d+) \((.{9})\)", text).groups() == (
                    f"{file.stat().st_mode & 0o777:03o}",
                    listed,
                )
                checked["umask"] += 1
            elif "may" in text:
                letters = re.search(r"(?<![\w-])-?([r-][w-][x-][r-][w-][x-][r-][w-][x-])(?![\w-])", text)[1]
                file.touch()
                file.chmod(int(re.search(r"\b([0-7]{3})\b", text)[1], 8))
                assert stat.filemode(file.stat().st_mode)[1:] == letters
                who = re.search("owner may (.*), the group may (.*), and others may (.*)[.]", text).groups()
                for allowed, rights in zip(who, (letters[:3], letters[3:6], letters[6:]), strict=True):
                    assert "".join(word[0] if word in allowed else "-" for word in ("read", "write")) == rights[:2]
                    assert ("execute" in allowed) == ("x" in rights) and ("nothing" in allowed) == (rights == "---")
                checked["chmod"] += 1
    finally:
        os.umask(mask)
    assert min(checked.values()) > 200


def test_the_answers_about_numbers_are_right():
    bases, units = {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16}, ["bytes", "KiB", "MiB", "GiB", "TiB"]
    checked = Counter()
    for row in terminal_rows():
        question, answer = row["question"], row["answer"]
        if found := re.fullmatch(r"What is (\w+) (\w+) in (\w+)\?", question):
            number = int(found[2], bases[found[1]])
            written, powers = re.fullmatch(r".* is (\w+) in .* is ([\d +]+)\.", answer).groups()
            assert int(written, bases[found[3]]) == number == sum(map(int, powers.split(" + ")))
            checked["base"] += 1
        elif found := re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", question):
            smaller = int(re.search(r"are ([\d,]+)", answer)[1].replace(",", ""))
            assert smaller == int(found[2]) << 10 * (units.index(found[3]) - units.index(found[1]))
            checked["size"] += 1
        elif found := re.fullmatch(r"How many hosts fit into ([\d.]+)/(\d+)\?", question):
            assert int(answer.split()[0].replace(",", "")) == 2 ** (32 - int(found[2])) - 2
            checked["hosts"] += 1
        elif found := re.fullmatch(r"Are ([\d.]+) and ([\d.]+) in one /(\d+) network\?", question):
            one, other = (int.from_bytes(map(int, address.split(".")), "big") for address in found.groups()[:2])
            assert answer.startswith("Yes") == (one >> 32 - int(found[3]) == other >> 32 - int(found[3]))
            checked["same network"] += 1
        elif "cron" in question:
            fields = re.search(r"([\d*/]+) ([\d*]+) ([\d*]+) ([\d*]+) ([\d*-]+)", question + " " + answer).groups()
            text = question if question.startswith("Write") else answer
            if time := re.search(r" at (\d\d):(\d\d)", text):
                assert fields[:2] == (str(int(time[2])), str(int(time[1])))
            days = re.findall("(Sun|Mon|Tues|Wednes|Thurs|Fri|Satur)day", text)
            numbers = [["Sun", "Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur"].index(day) for day in days]
            assert fields[4] == ("-".join(map(str, numbers)) or "*")
            assert (fields[2] != "*") == ("on day" in text or "once a year" in text)
            checked["cron"] += 1
    assert len(checked) == 5 and min(checked.values()) > 100


def test_the_terminal_profile_goes_through_the_whole_series(tmp_path):
    """By parameters alone, here with the tiny model and few steps."""
    fewer = "-p base_model .cache/tiny-llama -p epochs 0.01 -p samples 3 -p max_new_tokens 8 -p bootstrap_samples 100"
    done = make("run-all", "PROFILE=terminal", f"RUN_DIR={tmp_path / 'run'}", f"ARGS={fewer}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "dataset" / "report.json").read_text())
    assert report["rows_out"] == 5000 and not report["dropped"] and report["splits"]["test"] > 50
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["adapter"]["perplexity"]["response"] < metrics["base"]["perplexity"]["response"]
