"""What the benchmarks share: paths, the examples, notebooks of ours run in a process, memory."""

import os
import random
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# tokens of the 115 rows of medss19/home_remedies_dataset, prompt and template included
LENGTHS = [int(n) for n in (HERE / "lengths.txt").read_text().split()]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def run_notebook(name, parameters, before=None):
    """Run the cells of a notebook of ours in this process, with `before` those up to a heading.

    Returns its globals. Nothing else of PyTorch may be imported before: the notebook sets an option
    that PyTorch reads when it is imported.
    """
    os.environ.setdefault("MPLBACKEND", "agg")
    source = (ROOT / "notebooks_py" / f"{name}.py").read_text(encoding="utf-8")
    if before:
        source = source[: source.rindex("\n# %%", 0, source.index(f"\n# {before}\n"))]
    cells = source.split("\n# %%")
    defaults = [cell.startswith(' tags=["parameters"]') for cell in cells].index(True)
    chosen = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    cells.insert(defaults + 1, "\n" + chosen)
    namespace = {"__name__": name}
    exec(compile("\n# %%".join(cells), name, "exec"), namespace)
    return SimpleNamespace(**namespace)


def parameters_of(settings, base_model, run_dir):
    """The parameters of a notebook: those of the profile in `settings`, and the others on top."""
    from tabletune.run.parameters import read_profile

    profile = read_profile(ROOT / "profiles" / f"{settings['profile']}.yaml")
    return profile | settings | {"base_model": str(base_model), "run_dir": str(run_dir)}


def make_dataset(run_dir, base_model, steps):
    """Make a run folder as notebook 1 leaves it.

    Its examples have the lengths of the upstream's and the words of the bundled table.
    """
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    words = (ROOT / "data" / "home_remedies.csv").read_text(encoding="utf-8").split()
    sizes = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words]
    rng = random.Random(0)

    def conversation(length):
        text, room = [], length - 30  # the prompt, the template, BOS and EOS
        while room > 0:
            i = rng.randrange(len(words))
            if sizes[i] <= room:
                text.append(words[i])
                room -= sizes[i]
        prompt = [
            {"role": "user", "content": "I am suffering from a cold. Please suggest a home remedy."}
        ]
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": " ".join(text)}]}

    count = steps * 32 * 512 // 150
    rows = [conversation(length) for length in rng.choices(LENGTHS, k=count)]
    splits = {"train": rows, "validation": rows[:4], "test": rows[:4]}
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
    )
    splits.save_to_disk(Path(run_dir) / "dataset")
    (Path(run_dir) / "dataset" / "report.json").write_text('{"fingerprint": "benchmark"}')


def token_ids(run_dir, base_model):
    """The same examples as ids, for those that have their own way to a trainer."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    train = datasets.load_from_disk(Path(run_dir) / "dataset")["train"]
    return train.map(
        lambda row: {
            "input_ids": tokenizer.apply_chat_template(
                row["prompt"] + row["completion"], return_dict=False
            )
        },
        remove_columns=train.column_names,
    )


def limit_memory(gib):
    """Let this process reserve so much of the GPU and no more; all of it, if `gib` is None."""
    import torch

    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole) if gib else 1.0)


def installed_packages():
    """The versions of the packages that make a difference, of those that are there."""
    names = [
        "torch",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "liger-kernel",
        "unsloth",
        "xformers",
    ]
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now():
    """The date and the minute, as results of several runs can stand in one file."""
    return datetime.now(UTC).isoformat(timespec="minutes")


def peak_gib():
    """What PyTorch has reserved on the GPU at most."""
    import torch

    return round(torch.cuda.max_memory_reserved() / 2**30, 2)
