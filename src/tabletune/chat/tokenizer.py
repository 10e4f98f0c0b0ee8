"""Tokenizers: loading and saving them, stop tokens, padding."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tabletune.chat.templates import USER, around, pinned_template, render
from tabletune.errors import StageError, first_line, hub_error

# a text whose ids differ where a tokenizer reads spaces, accents, numbers or markers otherwise
PROBE = "[INST] Two  words, 1½ cups: ça va?\n\n\tif x: return {'a': [1]}  # 你好 🙂 [/INST]"
# the folders of a run that hold a tokenizer, and the notebook that makes them
MADE_BY = {"adapter": "02_finetune_qlora", "merged": "03_merge_adapter"}


def load_tokenizer(
    base_model: str, revision: str | None = None, thinking: bool = False, date: str = "2026-01-01"
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The base model's tokenizer, and the ids of the tokens at which an answer stops.

    The ids are those of its tokenizer.json as it stands: the class that transformers 5.13 picks for
    Llama 2 ignores the normalizer in it and splits `[INST]` into other tokens than the model was
    trained with. The chat template is pinned to `date`, and to a prompt that closes the model's
    thinking unless `thinking`. Padding is on the right, with a token that is not EOS where there is
    one: a collator that masks padding would mask every EOS, too, and the model never learns to stop
    (https://github.com/huggingface/trl/issues/696).

    Raises StageError if there is no such model, or if its template or its tokens cannot be used.
    """
    is_folder = Path(base_model).is_dir()
    try:
        config = AutoConfig.from_pretrained(base_model, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise hub_error(f"base_model={base_model}", error) from error
    try:
        tokenizer = read_tokenizer(base_model, revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not is_folder:
            raise hub_error(f"base_model={base_model}", error) from error
        raise StageError(
            f"base_model={base_model}: its tokenizer cannot be read ({first_line(error)}). "
            "Get its files again, or take another model."
        ) from error
    # the config's number, not len(tokenizer): some tokenizers have tokens that the model has no row
    # for
    embedding_rows = config.get_text_config().vocab_size
    if tokenizer.eos_token is None:
        raise StageError(
            f"base_model={base_model}: its tokenizer has no EOS token, so no answer could end. "
            "Take another model."
        )
    choose_pad_token(tokenizer, embedding_rows)
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of the text
    tokenizer.chat_template = pinned_template(tokenizer, thinking, date)
    stop_token_ids = find_stop_token_ids(tokenizer, base_model, revision, config)
    stop_token_ids = [token_id for token_id in stop_token_ids if token_id < embedding_rows]
    check_template_tokens(base_model, tokenizer, embedding_rows, stop_token_ids)
    return tokenizer, stop_token_ids


def check_template_tokens(
    base_model: str, tokenizer: PreTrainedTokenizerBase, rows: int, stop_token_ids: list[int]
) -> None:
    """Raise StageError if the template writes a token that has no row in the embedding matrix."""
    # all that a template writes by itself stands before and after an answer
    opened, _, after = around([USER], tokenizer)
    written = tokenizer(opened + after, add_special_tokens=False)["input_ids"]
    beyond = [token_id for token_id in written if token_id >= rows]
    if beyond or not stop_token_ids:
        token = tokenizer.convert_ids_to_tokens(beyond[0]) if beyond else None
        raise StageError(
            f"base_model={base_model}: its template uses {token!r}, which has no row among the "
            f"model's {rows:,} embeddings. Take a model whose tokenizer belongs to it."
        )


def template_settings(report: dict[str, Any]) -> tuple[bool, str]:
    """Whether the model thinks, and the template's date, in the data set that a `report` is of."""
    return report.get("thinking", False), report.get("template_date", "2026-01-01")


def read_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer as its tokenizer.json says; without one, of the class that transformers picks."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(source, revision=revision)
    except (GatedRepoError, RepositoryNotFoundError):
        raise
    except (OSError, ValueError, TypeError, AttributeError):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Give the tokenizer a pad token that is not EOS and is among `rows` embeddings, if it can."""
    pad = tokenizer.pad_token_id
    if pad is not None and pad != tokenizer.eos_token_id and pad < rows:
        return
    # a spare special token, such as UNK, is never in a text, so masking it masks no answer
    for token in tokenizer.all_special_tokens:
        is_spare = token not in (tokenizer.bos_token, tokenizer.eos_token)
        if is_spare and tokenizer.convert_tokens_to_ids(token) < rows:
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = tokenizer.eos_token


def save_tokenizer(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> None:
    """Save a tokenizer and its stop tokens, and check that what is read back gives the same ids.

    For some kinds of models AutoTokenizer takes a class of its own choice, whatever the folder
    says. Where its ids differ beside such a model's config, that is printed, as nothing that is
    saved can change it. Raises StageError if the tokenizer reads otherwise than before.
    """
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=stop_token_ids,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    # read back in both ways in which others will load it
    text = render([USER], tokenizer) + PROBE
    for saved in (load_tokenizer_of_run(folder)[0], AutoTokenizer.from_pretrained(folder)):
        if saved(text)["input_ids"] == tokenizer(text)["input_ids"]:
            continue
        if type(saved) is type(tokenizer) or not (Path(folder) / "config.json").exists():
            raise StageError(
                f"The tokenizer saved in {folder} gives other token ids than in training, so the "
                "model would read other tokens. Take another base model, and please report this."
            )
        print(
            f"AutoTokenizer reads this folder as {type(saved).__name__}, which gives other token "
            "ids. Load it with PreTrainedTokenizerFast."
        )


def load_tokenizer_of_run(folder: str | Path) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer and the stop token ids that notebook 2 left in `adapter/`, or 3 in `merged/`.

    Raises StageError if the folder is missing or cannot be read.
    """
    folder = Path(folder)
    stage = MADE_BY.get(folder.name, "the notebook that makes it")
    if not folder.is_dir():
        raise StageError(f"{folder} is missing. Run {stage} first, with the same run_dir.")
    try:
        tokenizer = read_tokenizer(folder)
        generation = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StageError(
            f"The tokenizer in {folder} cannot be read ({first_line(error)}). Run {stage} again."
        ) from error
    stop_token_ids = generation.eos_token_id
    if isinstance(stop_token_ids, int):
        stop_token_ids = [stop_token_ids]
    return tokenizer, list(stop_token_ids)


def find_stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    base_model: str,
    revision: str | None,
    config: PreTrainedConfig,
) -> list[int]:
    """The ids at which an answer ends, without repetition.

    These are EOS, the special token with which the template ends a turn, and the stop tokens of the
    model's generation config.
    """
    try:
        generation = GenerationConfig.from_pretrained(base_model, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    # a number, a list, or None
    configured = generation.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    after = tokenizer(around([USER], tokenizer)[2], add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    # the first special token after an answer ends the turn; what follows it opens the next one
    turn_end = [token_id for token_id in after if token_id in special][:1]
    candidates = [tokenizer.eos_token_id, *turn_end, *configured]
    in_vocabulary = [i for i in candidates if i is not None and i < len(tokenizer)]
    # without repetition, in the order in which they were named
    return list(dict.fromkeys(in_vocabulary))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of the special tokens: those with a role, and those marked as special."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)
