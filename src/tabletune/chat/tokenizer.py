"""Tokenizers: loading, saving, stop tokens, padding."""

from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tabletune.chat.templates import USER, around, pinned_template, render
from tabletune.errors import StageError, hub_error

PROBE = "[INST] Two  words, 1½ cups: ça va?\n\n\tif x: return {'a': [1]}  # 你好 🙂 [/INST]"


def load_tokenizer(base_model, revision=None, thinking=False, date="2026-01-01"):
    """The base model's tokenizer and the ids at which an answer stops: (tokenizer, [id, ...]).

    The ids are those of its tokenizer.json as it stands: the class that transformers 5.13 picks for Llama 2 ignores the
    normalizer in it and cuts `[INST]` into other tokens than the model was made with. The chat template is pinned, so
    that it is the same wherever the tokenizer is saved: to `date`, and to a prompt that closes the model's thinking
    unless `thinking`. Padding is on the right, with a token that is not EOS where there is one: a collator that masks
    padding would mask every EOS, too, and the model never learns to stop (https://github.com/huggingface/trl/issues/696).

    Raises StageError if there is no such model, or if its template or its tokens cannot be used.
    """
    try:
        config = AutoConfig.from_pretrained(base_model, revision=revision)
        tokenizer = read_tokenizer(base_model, revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, (GatedRepoError, RepositoryNotFoundError)):
            raise hub_error(f"base_model={base_model}", cause) from None
        reason = " ".join(str(error).split())[:160]
        why = f"not a model folder here (looked in {Path.cwd()}) nor on the Hub: check the name, the network, and "
        why = (
            "its tokenizer cannot be read"
            if Path(base_model).is_dir()
            else f"{why}`hf auth login` for a gated model"
        )
        raise StageError(f"base_model={base_model}: {why} ({reason}).") from None
    rows = config.get_text_config().vocab_size
    if tokenizer.eos_token is None:
        raise StageError(
            f"base_model={base_model}: its tokenizer has no EOS token, so no answer could end."
        )
    choose_pad_token(tokenizer, rows)
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of the text
    tokenizer.chat_template = pinned_template(tokenizer, thinking, date)
    stops = [i for i in find_stop_token_ids(tokenizer, base_model, revision, config) if i < rows]
    opened, _, after = around([USER], tokenizer)
    beyond = [
        i for i in tokenizer(opened + after, add_special_tokens=False)["input_ids"] if i >= rows
    ]
    if beyond or not stops:
        raise StageError(
            f"base_model={base_model}: its template uses {tokenizer.convert_ids_to_tokens((beyond or [None])[0])!r}, "
            f"which has no row among the model's {rows:,} embeddings. Take a model whose tokenizer belongs to it."
        )
    return tokenizer, stops


def template_settings(report):
    """Whether the model thinks, and which day a template takes for today, in the data set that a `report` is of."""
    return report.get("thinking", False), report.get("template_date", "2026-01-01")


def read_tokenizer(source, revision=None):
    """A tokenizer as its tokenizer.json says; only where there is none, whatever class transformers makes one with."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(source, revision=revision)
    except (GatedRepoError, RepositoryNotFoundError):
        raise
    except (OSError, ValueError, TypeError, AttributeError):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def choose_pad_token(tokenizer, rows):
    """Give the tokenizer a pad token that is not EOS and has a row in the embedding matrix, if it has a spare one."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token_id >= rows:
        taken = (tokenizer.bos_token, tokenizer.eos_token)
        spare = [token for token in tokenizer.all_special_tokens if token not in taken]
        usable = [token for token in spare if tokenizer.convert_tokens_to_ids(token) < rows]
        tokenizer.pad_token = usable[0] if usable else tokenizer.eos_token


def save_tokenizer(folder, tokenizer, stops):
    """Save a tokenizer and its stops, and prove that what is read back gives the same ids. Raises StageError if not.

    For some kinds of models AutoTokenizer takes a class of its own choice, whatever the folder says; where its ids
    differ beside such a model's config, that is said, as nothing that is saved can change it.
    """
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=stops, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    text = render([USER], tokenizer) + PROBE
    for again in (load_tokenizer_of_run(folder)[0], AutoTokenizer.from_pretrained(folder)):
        if again(text)["input_ids"] == tokenizer(text)["input_ids"]:
            continue
        if type(again) is type(tokenizer) or not (Path(folder) / "config.json").exists():
            raise StageError(
                f"The tokenizer saved in {folder} gives other ids than before: the model would read others."
            )
        print(
            f"AutoTokenizer reads it as {type(again).__name__}, with other ids: use PreTrainedTokenizerFast with it."
        )


def load_tokenizer_of_run(folder):
    """The tokenizer and the stops that notebook 2 left in `adapter/`, or 3 in `merged/`: (tokenizer, stops)."""
    try:
        tokenizer, generation = read_tokenizer(folder), GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(
            f"The tokenizer in {folder} cannot be read ({reason}). Run the notebook that made it again."
        ) from None
    stops = generation.eos_token_id
    return tokenizer, [stops] if isinstance(stops, int) else list(stops)


def find_stop_token_ids(tokenizer, base_model, revision, config):
    """Where an answer ends: EOS, what the model's generation config says, and what the template ends a turn with."""
    try:
        generation = GenerationConfig.from_pretrained(base_model, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    more = (
        generation.eos_token_id
        if isinstance(generation.eos_token_id, list)
        else [generation.eos_token_id]
    )
    after = tokenizer(around([USER], tokenizer)[2], add_special_tokens=False)["input_ids"]
    turn_end = [i for i in after if i in special_ids(tokenizer)][:1]
    known = (
        i
        for i in [tokenizer.eos_token_id, *turn_end, *more]
        if i is not None and i < len(tokenizer)
    )
    return list(dict.fromkeys(known))


def special_ids(tokenizer):
    """The ids of the special tokens: those with a role, and those that the tokenizer marks as special."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)
