"""The chat page: base and fine-tuned model answer each question side by side.

It is one model, asked with its adapter and without. The page shows what an answer rests on.
"""

import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tabletune.chat.encoding import answer_text, encode_prompt
from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.data.context import ContextPrompt, TableContext, load_context
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.errors import StageError
from tabletune.evaluation.answers import without_settings
from tabletune.model.adapters import attach_adapter
from tabletune.model.devices import compute_dtype
from tabletune.model.quantization import load_base
from tabletune.run.artifacts import check_run, load_dataset_of_run
from tabletune.run.files import read_json
from tabletune.run.machine import pinned
from tabletune.run.stage import Stage

if TYPE_CHECKING:
    import gradio

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page sends nothing anywhere

Messages = list[dict[str, str]]
EXAMPLES = 3
WAITING = "…"


@dataclass
class Chat:
    """What the page asks, and how."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    disclaimer: str
    window: int  # tokens of a question, its rows and its answer
    max_new_tokens: int
    context: TableContext | None = None  # finds rows of the table; None with context_rows 0
    system: Messages = field(default_factory=list)  # the table's system message, or nothing
    examples: list[str] = field(default_factory=list)  # questions to click on

    def prompt(self, question: str) -> ContextPrompt:
        """What both models are asked.

        The system message and the question, with the rows that were found for it.
        """
        messages = [*self.system, {"role": "user", "content": question}]
        if self.context is None:
            return ContextPrompt(messages, [], False)
        return self.context.prompt(messages)


@dataclass
class BatchPass:
    """One call of `generate`: which of the two answers it makes, and with which adapters."""

    rows: list[int]  # 0: the base model's answer, 1: the fine-tuned model's
    options: dict[str, Any] = field(default_factory=dict)
    adapter: AbstractContextManager = field(default_factory=nullcontext)


def load_chat(stage: Stage) -> Chat:
    """Load the models of a run as the training had them, and what the page needs beside.

    Raises StageError if Gradio is missing, or if the adapter was trained on another data set or
    another base model.
    """
    if find_spec("gradio") is None:
        raise StageError(
            "Gradio is missing here, and the page needs it. Run `make chat`, or pip install "
            f"{pinned('gradio')}."
        )
    run = stage.folder
    parameters = stage.parameters
    splits, report = load_dataset_of_run(run)
    check_run(run, None, report, parameters["base_model"])
    tokenizer, stop_token_ids = load_tokenizer_of_run(run / "adapter")
    disclaimer = parameters["disclaimer"]
    if not disclaimer:
        disclaimer = example_settings(report).get("disclaimer", NEUTRAL_DISCLAIMER)
    chat = Chat(
        model=load_model_of_run(run / "adapter", parameters),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        disclaimer=disclaimer,
        window=parameters["window"],
        max_new_tokens=parameters["max_new_tokens"],
        context=load_context(run, "use", parameters["unknown_threshold"]),
    )
    add_examples(chat, splits["test"]["prompt"])
    return chat


def load_model_of_run(adapter: Path, parameters: dict[str, Any]) -> PeftModel:
    """The base model, quantized as for the training, with the adapter of a folder."""
    provenance = read_json(adapter / "provenance.json", "02_finetune_qlora")
    base = load_base(
        parameters["base_model"],
        parameters["base_model_revision"],
        compute_dtype(parameters["precision"]),
        parameters["attn_implementation"],
        quantization=provenance.get("quantization", "nf4"),
    )
    return attach_adapter(base, adapter)


def add_examples(chat: Chat, prompts: list[Messages]) -> None:
    """Take the system message, and questions to click on, from prompts of the table.

    Those of texts are empty.
    """
    prompts = [prompt for prompt in prompts if prompt]
    if prompts:
        chat.system = [message for message in prompts[0] if message["role"] == "system"]
    questions = dict.fromkeys(prompt[-1]["content"] for prompt in prompts)
    chat.examples = list(questions)[:EXAMPLES]


# --- answers


def two_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: list[int],
    messages: Messages,
    max_new_tokens: int,
) -> Iterator[list[str]]:
    """Yield the answers of base and fine-tuned model so far, after each token. Greedy.

    These are two texts. Each row of a batch gets an adapter of its own or none, so both answers
    grow at once, and one that has stopped waits for the other. Where PEFT cannot do that (DoRA,
    experts), one comes after the other.
    """
    prompt = encode_prompt(messages, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_token_ids
    )
    settings.pad_token_id = tokenizer.pad_token_id
    answers: list[list[int]] = [[], []]  # ids: of the base model, of the fine-tuned one
    for batch in batch_passes(model):
        with batch.adapter:
            steps = stream(model, [prompt] * len(batch.rows), settings, **batch.options)
            for new_ids in steps:
                for row, token in zip(batch.rows, new_ids, strict=True):
                    answers[row].append(token)
                yield [answer_text(ids, tokenizer, stop_token_ids)[0] for ids in answers]


def batch_passes(model: PeftModel) -> list[BatchPass]:
    """One pass for both answers, or two where rows of a batch cannot have different adapters."""
    config = model.peft_config["default"]
    has_expert_adapters = any(
        "expert" in name and hasattr(module, "lora_A") for name, module in model.named_modules()
    )
    # for these PEFT takes no `adapter_names`
    if config.use_dora or config.target_parameters or has_expert_adapters:
        return [BatchPass([0], adapter=model.disable_adapter()), BatchPass([1])]
    return [BatchPass([0, 1], {"adapter_names": ["__base__", "default"]})]


def stream(
    model: PeftModel, prompts: list[list[int]], settings: GenerationConfig, **options: Any
) -> Iterator[list[int]]:
    """Yield the new ids of all rows, [rows], after each step of `generate`.

    `generate` runs in a thread, and ends when nobody listens any more.
    """
    # no padding: both rows have the same prompt
    input_ids = torch.tensor(prompts, device=model.device)  # [rows, tokens]
    steps: Queue = Queue()
    closed = Event()

    def put(ids: torch.Tensor) -> None:
        if ids.dim() == 1:  # not the prompt, [rows, tokens], which comes first
            steps.put(ids.tolist())

    def stop_when_closed(*_: Any) -> bool:
        return closed.is_set()

    with without_settings(model), ThreadPoolExecutor(1) as thread:
        generation = thread.submit(
            model.generate,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=settings,
            streamer=SimpleNamespace(put=put, end=lambda: None),
            stopping_criteria=[stop_when_closed],
            **options,
        )
        # ends the loop below, also after an error
        generation.add_done_callback(lambda _: steps.put(None))
        try:
            yield from iter(steps.get, None)
            generation.result()  # raises what `generate` raised
        finally:
            closed.set()


# --- what an answer rests on


def settle(context: TableContext, prompt: ContextPrompt, answer: str) -> tuple[str, str, str]:
    """The answer that counts, and what it rests on: a title, and the rows in Markdown.

    An answer that says that the table has nothing rests on nothing; then the title says why, and
    the rows are those that came nearest.
    """
    settings = context.settings
    rows = prompt.rows
    text = "\n".join(row_text(number, row) for number, row in enumerate(rows, 1))
    if prompt.refused:
        best = max((row["score"] for row in rows), default=0.0)
        limit = settings.unknown_threshold
        title = f"Rests on nothing: no row is similar enough (best {best:.2f}, limit {limit:.2f})"
        return settings.unknown_answer, title, f"The model was not asked. Nearest rows:\n\n{text}"
    final, unknown = context.final_answer(answer, prompt)
    if unknown:
        title = "Rests on nothing: the model found no answer in these rows"
        return final, title, text
    if final != answer:
        title = "Rests on 1 row of the table, which asks nearly the same"
        return final, title, row_text(1, rows[0])
    title = (
        "Rests on 1 row of the table"
        if len(rows) == 1
        else f"Rests on {len(rows)} rows of the table"
    )
    return final, title, text


def row_text(number: int, row: dict) -> str:
    """A row that was found, as an item of a list in Markdown.

    Its question, how similar it is, its answer.
    """
    head = f"{number}. **{row['question']}** (similarity {row['score']:.2f})"
    lines = [line for line in row["answer"].splitlines() if line.strip()]
    return "  \n   ".join([head, *lines])  # two spaces end a line, three continue the item


# --- the page


def chat_page(chat: Chat) -> "gradio.Blocks":
    """The page, ready to be launched, under the disclaimer. Needs Gradio."""
    import gradio as gr

    def ask(question: str, base_chat: Messages, tuned_chat: Messages) -> Iterator[tuple]:
        """Yield the text box and the two conversations while the answers grow."""
        question = question.strip()
        problem = problem_with(chat, question)
        if problem:
            gr.Warning(problem)
            yield question, base_chat, tuned_chat
            return
        for base, tuned in answer_turns(chat, question):
            yield "", base_chat + base, tuned_chat + tuned

    with gr.Blocks(title="Base and fine-tuned side by side") as page:
        gr.HTML(f"<strong>{escape(chat.disclaimer)}</strong>", elem_id="disclaimer")
        with gr.Row():
            base_chat = gr.Chatbot(label="Base model", height="55vh", buttons=["copy"])
            tuned_chat = gr.Chatbot(label="Fine-tuned", height="55vh", buttons=["copy"])
        with gr.Row():
            box = gr.Textbox(
                placeholder="Your question", show_label=False, scale=4, max_lines=4, autofocus=True
            )
            send = gr.Button("Ask", variant="primary", scale=1, min_width=80)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
            gr.ClearButton([box, base_chat, tuned_chat], value="Clear", scale=1, min_width=80)
        examples = [[question] for question in chat.examples]
        gr.Examples(examples, box, label="Questions that were not in training")
        parts = [box, base_chat, tuned_chat]
        asking = gr.on([box.submit, send.click], ask, parts, parts, concurrency_limit=1)
        stop.click(None, cancels=[asking])
    return page.queue(max_size=20)


def problem_with(chat: Chat, question: str) -> str | None:
    """Why a question cannot be asked, or None."""
    if not question:
        return "Please type a question first."
    length = len(encode_prompt(chat.prompt(question).messages, chat.tokenizer))
    room = chat.window - chat.max_new_tokens
    if length <= room:
        return None
    what = "This question is" if chat.context is None else "This question with its rows is"
    return f"{what} too long: {length:,} tokens, and there is room for {room:,}."


def answer_turns(chat: Chat, question: str) -> Iterator[tuple[list[dict], list[dict]]]:
    """Yield the turns of base and fine-tuned model while their answers grow.

    A turn is a list of messages. Both see the same rows. Below the fine-tuned model's answer
    stands, in the end, what it rests on.
    """
    user = {"role": "user", "content": question}
    prompt = chat.prompt(question)
    # a refused question is still answered by the base model, for comparison
    base = tuned = ""
    answers = two_answers(
        chat.model, chat.tokenizer, chat.stop_token_ids, prompt.messages, chat.max_new_tokens
    )
    for base, tuned in answers:
        if prompt.refused:
            tuned = WAITING
        yield [user, assistant(base)], [user, assistant(tuned)]
    if chat.context is not None:
        final, title, rows = settle(chat.context, prompt, tuned)
        sources = {"role": "assistant", "content": rows, "metadata": {"title": title}}
        yield [user, assistant(base)], [user, assistant(final), sources]


def assistant(text: str) -> dict:
    """A message of the model."""
    return {"role": "assistant", "content": text or WAITING}


def open_page(page: "gradio.Blocks", inline: bool = True) -> str:
    """Serve a page to this machine alone, and show it in the notebook if `inline`.

    Returns its address. Left to itself, Gradio in Colab downloads a program that opens a tunnel,
    through which anybody could ask for a week. Colab's own proxy does as well, once Gradio knows
    that its address is another one outside (https://github.com/gradio-app/gradio/issues/13629).
    """
    import gradio as gr

    address: dict[str, Any] = {}
    if "google.colab" in sys.modules:
        from google.colab.output import eval_js

        port = free_port()
        proxy = eval_js(f"google.colab.kernel.proxyPort({port})")
        address = {"server_port": port, "root_path": proxy}
    css = resources.files("tabletune") / "resources/templates/chat.css"
    page.launch(
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inline=inline,
        css=css.read_text(encoding="utf-8"),
        # fonts of the machine, none from the network
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        **address,
    )
    return address.get("root_path", page.local_url)


def free_port() -> int:
    """A port of this machine that nothing uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
