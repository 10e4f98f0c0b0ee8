"""The chat page: one model answers each question twice, with its adapter and without."""

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from html import escape
from importlib import resources
from queue import Queue
from threading import Event
from types import SimpleNamespace

import torch
from transformers import GenerationConfig

from tabletune.chat.encoding import answer_text, encode_prompt
from tabletune.evaluation.answers import without_settings

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page sends nothing anywhere


def two_answers(model, tokenizer, stops, messages, max_new_tokens):
    """Yield the answers of the base and of the fine-tuned model so far, two texts, after each token. Greedy.

    `model` is a PeftModel. Each row of a batch gets an adapter of its own or none, so that both answers grow at once,
    and one that has stopped waits for the other. Where PEFT cannot do that (DoRA, experts), one comes after the other.
    """
    ids, new, config = encode_prompt(messages, tokenizer), [[], []], model.peft_config["default"]
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops)
    settings.pad_token_id = tokenizer.pad_token_id
    experts = any(
        "expert" in name and hasattr(module, "lora_A") for name, module in model.named_modules()
    )
    ways = [([0, 1], {"adapter_names": ["__base__", "default"]}, nullcontext())]
    if config.use_dora or config.target_parameters or experts:
        ways = [([0], {}, model.disable_adapter()), ([1], {}, nullcontext())]
    for rows, how, adapter in ways:
        with adapter:
            for step in stream(model, [ids] * len(rows), settings, **how):
                for row, token in zip(rows, step, strict=True):
                    new[row].append(token)
                yield [answer_text(row, tokenizer, stops)[0] for row in new]


def stream(model, prompts, config, **how):
    """Yield the new ids of all rows, [rows], after each step of `generate`, which ends when nobody listens any more."""
    ids, steps, closed = torch.tensor(prompts, device=model.device), Queue(), Event()
    streamer = SimpleNamespace(
        put=lambda new: new.dim() == 1 and steps.put(new.tolist()), end=lambda: None
    )
    how |= {
        "streamer": streamer,
        "stopping_criteria": [lambda *_: closed.is_set()],
        "generation_config": config,
    }
    with without_settings(model), ThreadPoolExecutor(1) as thread:
        work = thread.submit(
            model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **how
        )
        work.add_done_callback(lambda _: steps.put(None))
        try:
            yield from iter(steps.get, None)
            work.result()
        finally:
            closed.set()


def chat_page(model, tokenizer, stops, rows, disclaimer, window, max_new_tokens):
    """The page, ready to be launched, under the disclaimer. Needs Gradio.

    Each question is asked as those in `rows`, which are shown as examples: by itself, after the table's system message
    if it has one. With its answer it has room in `window` tokens.
    """
    import gradio as gr

    prompts, most = [row["prompt"] for row in rows if row["prompt"]], window - max_new_tokens
    system = [message for message in (prompts or [[]])[0] if message["role"] == "system"]

    def ask(question, *chats):
        """Yield the text box and the two conversations while the answers grow."""
        asked = {"role": "user", "content": question.strip()}
        length = len(encode_prompt([*system, asked], tokenizer))
        if not asked["content"] or length > most:
            long = f"This question is too long: it has {length:,} tokens, and there is room for {most:,}."
            gr.Warning(long if asked["content"] else "Please type a question first.")
            yield asked["content"], *chats
            return
        for texts in two_answers(model, tokenizer, stops, [*system, asked], max_new_tokens):
            new = [[asked, {"role": "assistant", "content": text or "…"}] for text in texts]
            yield "", chats[0] + new[0], chats[1] + new[1]

    with gr.Blocks(title="Base and fine-tuned side by side") as page:
        gr.HTML(f"<strong>{escape(disclaimer)}</strong>", elem_id="disclaimer")
        with gr.Row():
            chats = [
                gr.Chatbot(label=name, height="55vh", buttons=["copy"])
                for name in ("Base model", "Fine-tuned")
            ]
        with gr.Row():
            box = gr.Textbox(
                placeholder="Your question", show_label=False, scale=4, max_lines=4, autofocus=True
            )
            send = gr.Button("Ask", variant="primary", scale=1, min_width=80)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
            gr.ClearButton([box, *chats], value="Clear", scale=1, min_width=80)
        examples = dict.fromkeys(prompt[-1]["content"] for prompt in prompts)
        gr.Examples(
            [[text] for text in list(examples)[:3]],
            box,
            label="Questions that were not in training",
        )
        asking = gr.on(
            [box.submit, send.click], ask, [box, *chats], [box, *chats], concurrency_limit=1
        )
        stop.click(None, cancels=[asking])
    return page.queue(max_size=20)


def open_page(page, inline=True):
    """Serve a page to this machine alone, and show it in the notebook if `inline`. Returns its address.

    Left to itself, Gradio in Colab downloads a program that opens a tunnel, through which anybody could ask for a week.
    Colab's own proxy does as well, once Gradio knows that its address is another outside
    (https://github.com/gradio-app/gradio/issues/13629).
    """
    import gradio as gr

    place = {}
    if "google.colab" in sys.modules:
        from google.colab.output import eval_js

        with socket.socket() as any_free:
            any_free.bind(("127.0.0.1", 0))
            port = any_free.getsockname()[1]
        place = {
            "server_port": port,
            "root_path": eval_js(f"google.colab.kernel.proxyPort({port})"),
        }
    style = (resources.files("tabletune") / "resources/templates/chat.css").read_text(
        encoding="utf-8"
    )
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )  # none from the network
    page.launch(
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inline=inline,
        css=style,
        theme=theme,
        **place,
    )
    return place.get("root_path", page.local_url)
