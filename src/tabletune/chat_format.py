"""From messages to token ids: the chat template, what the loss sees, and where an answer stops.

One rule is kept for every template: what the model sees when it is asked is, token by token, the beginning of what it
was trained on. So the ids of an example are the ids of its prompt, as the template opens the answer, and after them the
answer and the token that ends the turn.
"""

import json
import re
from functools import lru_cache
from html import escape
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from .chat_templates import USER, around, pinned_template, render, thinking_is_on
from .run import StageError, hub_error

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
        why = "its tokenizer cannot be read" if Path(base_model).is_dir() else f"{why}`hf auth login` for a gated model"
        raise StageError(f"base_model={base_model}: {why} ({reason}).") from None
    rows = config.get_text_config().vocab_size
    if tokenizer.eos_token is None:
        raise StageError(f"base_model={base_model}: its tokenizer has no EOS token, so no answer could end.")
    choose_pad_token(tokenizer, rows)
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of the text
    tokenizer.chat_template = pinned_template(tokenizer, thinking, date)
    stops = [i for i in stop_ids(tokenizer, base_model, revision, config) if i < rows]
    opened, _, after = around([USER], tokenizer)
    beyond = [i for i in tokenizer(opened + after, add_special_tokens=False)["input_ids"] if i >= rows]
    if beyond or not stops:
        raise StageError(
            f"base_model={base_model}: its template uses {tokenizer.convert_ids_to_tokens((beyond or [None])[0])!r}, "
            f"which has no row among the model's {rows:,} embeddings. Take a model whose tokenizer belongs to it."
        )
    return tokenizer, stops


def pinned_in(report):
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
        print(f"AutoTokenizer reads it as {type(again).__name__}, with other ids: use PreTrainedTokenizerFast with it.")


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


def stop_ids(tokenizer, base_model, revision, config):
    """Where an answer ends: EOS, what the model's generation config says, and what the template ends a turn with."""
    try:
        generation = GenerationConfig.from_pretrained(base_model, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    more = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    after = tokenizer(around([USER], tokenizer)[2], add_special_tokens=False)["input_ids"]
    turn_end = [i for i in after if i in special_ids(tokenizer)][:1]
    known = (i for i in [tokenizer.eos_token_id, *turn_end, *more] if i is not None and i < len(tokenizer))
    return list(dict.fromkeys(known))


def special_ids(tokenizer):
    """The ids of the special tokens: those with a role, and those that the tokenizer marks as special."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def encode_prompt(messages, tokenizer, tools=None):
    """Token ids of messages up to where the answer begins. Without messages: what the tokenizer puts before a text."""
    if not messages:
        return tokenizer("")["input_ids"][:1] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    return tokenizer(render(messages, tokenizer, True, tools), add_special_tokens=False)["input_ids"]


def encode(example, tokenizer, stops):
    """Token ids of a conversation and the mask of what the loss sees: `input_ids`, `completion_mask`, equally long.

    `example` has `prompt`, messages up to the last answer, `completion`, that answer as one message, and perhaps
    `tools` as a JSON text. In the loss are the answers of all turns, each with the stop that ends it. Without a prompt
    the completion is a plain text, all of it in the loss. Raises StageError if the template cannot be used.
    """
    return encode_all([example], tokenizer, stops)[0]


def encode_all(examples, tokenizer, stops):
    """`encode` for many examples, whose texts are cut into tokens all at once."""
    texts = [texts_of(example, tokenizer) for example in examples]
    prompts = tokenizer([prompt for prompt, _ in texts] or [""], add_special_tokens=False)["input_ids"]
    turns = any(message["role"] == "assistant" for example in examples for message in example["prompt"])
    wholes = tokenizer(
        [prompt + answer for prompt, answer in texts] or [""], add_special_tokens=False, return_offsets_mapping=turns
    )
    encoded = []
    for i, example in enumerate(examples):
        if not example["prompt"]:
            encoded.append(encode_text(example["completion"][0]["content"], tokenizer, stops))
            continue
        ids, prompt = wholes["input_ids"][i], prompts[i]
        joined = ids[: len(prompt)] == prompt
        answer = ids[len(prompt) :] if joined else continuation(texts[i][1], tokenizer)
        end = min((answer.index(stop) for stop in stops if stop in answer), default=None)
        answer = [*answer, tokenizer.eos_token_id] if end is None else answer[: end + 1]
        mask = [0] * len(prompt)
        if any(message["role"] == "assistant" for message in example["prompt"]):
            offsets = tokenizer(texts[i][0], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            mask = mask_of_turns(example["prompt"], texts[i][0], prompt, offsets, stops)
        encoded.append({"input_ids": prompt + answer, "completion_mask": mask + [1] * len(answer)})
    return encoded


def decode_all(rows, tokenizer):
    """The texts of rows of ids, special tokens included, all at once where the tokenizer can do that."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.decode_batch(rows, skip_special_tokens=False) if backend else tokenizer.decode(rows)


def encode_text(text, tokenizer, stops):
    """A text that is no conversation, with the tokenizer's own BOS if it has one, and a stop at its end."""
    ids = tokenizer(text)["input_ids"]
    ids = ids if ids and ids[-1] in stops else [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "completion_mask": [1] * len(ids)}


def texts_of(example, tokenizer):
    """An example as two texts: the prompt as the model will be asked, and all that it is to write."""
    if not example["prompt"]:
        return "", ""
    tools = json.loads(example["tools"]) if example.get("tools") else None
    prompt = render(example["prompt"], tokenizer, True, tools)
    roles = tuple(message["role"] for message in example["prompt"])
    between, after = written_around(tokenizer.chat_template, roles, tokenizer)
    answer = example["completion"][0]["content"]
    if thinking_is_on(tokenizer):
        reasoning, _, answer = answer.rpartition("</think>")
        reasoning = reasoning.rpartition("<think>")[2].strip("\n")
        opening = "" if prompt.rstrip().endswith("<think>") else "<think>\n"
        between = f"{opening}{reasoning}\n</think>\n\n"
        answer = answer.lstrip("\n")
    return prompt, between + answer + after


@lru_cache(maxsize=256)
def written_around(template, roles, tokenizer):
    """The white space that `template` writes between a prompt of these roles and the answer, and all after it."""
    try:
        opened, before, after = around([{"role": role, "content": "x"} for role in roles], tokenizer)
    except StageError:  # a tool's turn, say, needs more than a text
        opened, before, after = around([USER], tokenizer)
    between = before[len(opened) :] if before.startswith(opened) else ""
    return between if not between.strip() else "", after


def continuation(text, tokenizer):
    """The ids of a text that follows something, which is not to merge with it: without a space put in front."""
    for before in ("\n", "a", "."):
        first = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if ids[: len(first)] == first:
            return ids[len(first) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def mask_of_turns(messages, text, ids, offsets, stops):
    """The mask of the earlier answers in a prompt, each with its stop: a list as long as `ids`.

    Raises StageError if the template changes an earlier answer, so that it cannot be found.
    """
    mask, place = [0] * len(ids), 0
    for message in messages:
        content = message["content"].strip()
        kept = next(
            (part for part in (content, content.rpartition("</think>")[2].strip()) if part in text[place:]), None
        )
        if kept is None:
            raise StageError(
                f"The model's chat template changes a {message['role']}'s turn: {content[:60]!r} is not in it."
            )
        start = text.index(kept, place)
        place = start + len(kept)
        if message["role"] != "assistant" or not kept:
            continue
        inside = [k for k, (first, last) in enumerate(offsets) if last > start and first < place]
        end = next((k for k in range(inside[-1] + 1, len(ids)) if ids[k] in stops), inside[-1])
        mask[inside[0] : end + 1] = [1] * (end + 1 - inside[0])
    return mask


def answer_text(ids, tokenizer, stops):
    """What a person reads of generated ids: (text, whether it stopped, how many tokens it took, the stop included)."""
    end = next((k for k, token in enumerate(ids) if token in stops), None)
    ids = ids if end is None else ids[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if thinking_is_on(tokenizer):
        text = text.rpartition("</think>")[2]
    return text.strip(), end is not None, len(ids)


@lru_cache(maxsize=8)
def markers_of(tokenizer):
    """What a text must not contain: the special tokens, and the markers that the template writes as plain text."""
    special = set(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))
    written = set(re.findall(r"\[/?[A-Z_]{2,}\]|<<?/?SYS>>|<\|[^|>\s]+\|>", tokenizer.chat_template or ""))
    return sorted(
        special | written | ({"<<SYS>>", "<</SYS>>"} if "[INST]" in written else set()), key=len, reverse=True
    )


def break_markers(text, tokenizer):
    """Put a space into every marker that occurs in `text`, so that the tokenizer reads it as plain text."""
    for marker in markers_of(tokenizer):
        if marker in text:
            text = text.replace(marker, marker[0] + " " + marker[1:])
    return text


def show_tokens(encoded, tokenizer):
    """HTML of an encoded row: what is not in the loss grey, what is on colour, special tokens bold."""
    from IPython.display import HTML

    spans, special = [], special_ids(tokenizer)
    for token_id, in_loss in zip(encoded["input_ids"], encoded["completion_mask"], strict=True):
        text = escape(tokenizer.decode([token_id])).replace("\n", "⏎")
        style = "background:#cfe8fc;color:#000" if in_loss else "color:#777"
        style += ";font-weight:bold;text-decoration:underline" if token_id in special else ""
        spans.append(f'<span style="{style};border:1px solid #bbb;margin:1px;padding:0 2px">{text or "&nbsp;"}</span>')
    return HTML("<div style='line-height:1.9'>" + " ".join(spans) + "</div>")
