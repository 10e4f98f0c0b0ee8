"""CUDA graphs: what the GPU does again and again in the same shapes, recorded once and then started as one.

A layer of a language model is some thirty kernels. With few tokens to work on, Python takes longer to start them than
the GPU to run them: on an H100, a step of training a 7B on one row of 512 tokens took 0.21 s, 0.07 s when recorded, and
48 tokens of 11 answers 2.2 s, 0.9 s when recorded. What waits for the GPU on the way cannot be recorded, and then
nothing changes.
"""

import inspect
from contextlib import suppress

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPast

from tabletune.model.inspection import text_part

MOST_TOKENS = 4096  # of a batch: with more, the GPU is the slower one


def is_small_batch(batch_size, max_length, processes):
    """Whether a batch of a training is one that recording makes faster: a small one, in one process."""
    return batch_size * max_length <= MOST_TOKENS and processes == 1


def uses_dropout(model: torch.nn.Module) -> bool:
    """Whether a model draws random numbers in training: by dropout of its own or of its adapters."""
    config = model.config.get_text_config()
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    return bool(getattr(config, "attention_dropout", 0)) or any(m.p > 0 for m in modules)


def dtype_of(args):
    """The dtype that a Trainer with these arguments computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def supports_cuda_graph(model):
    """Whether a model asks for nothing on its way that depends on what it computes.

    transformers says so of each architecture. Mixtures of experts are left out, as their way depends on the tokens.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        plain._can_compile_fullgraph
        and "position_ids" in inspect.signature(type(plain).forward).parameters
        and not any(parameter.dim() == 3 for parameter in plain.parameters())
    )


def layers_support_cuda_graph(model):
    """Whether a model can be recorded and hands its layers the token ids; a multimodal one hands them embeddings."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return supports_cuda_graph(plain) and plain.base_model is text_part(plain)


def cuda_graph(step):
    """A function that has run before, to be run again and again: its CUDA graph, or itself if there can be none.

    The graph reads and writes the same memory each time: its inputs are to be changed in place.
    """
    if not torch.cuda.is_available():
        return step
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = step()
    except RuntimeError:
        return step

    def replay():
        graph.replay()
        return output

    return replay


class CudaGraphCallback(TrainerCallback):
    """Record the layers of a model, forward and backward, before a training on small batches of packed rows begins.

    Embedding to last hidden state, that is: the loss waits for the GPU. What has more rows or another length, and what
    needs no gradient, goes the usual way.
    """

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        shape = (args.per_device_train_batch_size, args.max_length)
        packed = "seq_lengths" in getattr(train_dataloader.dataset, "column_names", [])
        again = args.gradient_checkpointing  # layers that keep no state of a random generator
        again_plainly = not (args.gradient_checkpointing_kwargs or {}).get(
            "preserve_rng_state", True
        )
        fit = (
            is_small_batch(*shape, args.world_size)
            and packed
            and not uses_dropout(model)
            and (not again or again_plainly)
        )
        if fit and model.device.type == "cuda" and layers_support_cuda_graph(model):
            dtype = dtype_of(args)
            with (
                suppress(RuntimeError),
                torch.autocast("cuda", dtype, dtype != torch.float32, cache_enabled=False),
            ):
                graph_layers(text_part(model.get_base_model()), shape)


class Layers(torch.nn.Module):
    """A decoder that takes token ids and positions, tensors [rows, tokens], and gives the last hidden state."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.usual = decoder, decoder.forward

    def forward(self, input_ids, position_ids):
        return self.usual(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state


def graph_layers(decoder, shape):
    """Replace the forward of `decoder` for ids of this shape, [rows, tokens], or fewer rows, with gradients."""
    layers = Layers(decoder).train()
    decoder.train()
    ids = torch.zeros(shape, dtype=torch.long, device=decoder.device)
    # two examples a row: what is alone in its row is masked in another way
    positions = (
        torch.arange(shape[1], device=decoder.device)
        .remainder(shape[1] // 2 + 1)
        .repeat(shape[0], 1)
    )
    # the adapter's gradients come from the stream that recorded them, which is no mistake here
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    replay = torch.cuda.make_graphed_callables(layers, (ids, positions), num_warmup_iters=1)
    for parameter in layers.parameters():
        if (
            parameter.requires_grad
        ):  # the graph's own gradient would be kept, and overwritten by the next batch's
            parameter.register_hook(torch.clone)

    def forward(input_ids=None, attention_mask=None, position_ids=None, **others):
        like = input_ids is not None and position_ids is not None and input_ids.shape[1] == shape[1]
        if (
            like
            and len(input_ids) <= shape[0]
            and attention_mask is None
            and torch.is_grad_enabled()
        ):
            lacking = (
                0,
                0,
                0,
                shape[0] - len(input_ids),
            )  # of the last batch: as much memory again would be taken
            full = (
                torch.nn.functional.pad(tensor, lacking) for tensor in (input_ids, position_ids)
            )
            return BaseModelOutputWithPast(last_hidden_state=replay(*full)[: len(input_ids)])
        return layers.usual(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others
        )

    decoder.forward = forward
