"""CUDA graphs: work that a GPU repeats in the same shapes, recorded once and then started as one.

A layer of a language model is some thirty kernels. With few tokens, Python takes longer to start
them than the GPU to run them. On an H100, a training step of a 7B on one row of 512 tokens took
0.21 s, and 0.07 s as a graph; 48 tokens of 11 answers took 2.2 s, and 0.9 s as graphs. Work that
waits for the GPU on its way cannot be recorded, and then nothing changes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPast

from tabletune.errors import first_line
from tabletune.model.compat import checkpointing_of, never_waits_for_gpu
from tabletune.model.inspection import text_part

MOST_TOKENS = 4096  # of a batch: with more, the GPU is the slower one, even an H200


def is_small_batch(batch_size: int, max_length: int, processes: int) -> bool:
    """Whether a graph makes training on such a batch faster: it is small, and in one process."""
    return batch_size * max_length <= MOST_TOKENS and processes == 1


def dtype_of(args: TrainingArguments) -> torch.dtype:
    """The dtype that a Trainer with these arguments computes in."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def uses_dropout(model: torch.nn.Module) -> bool:
    """Whether a model draws random numbers in training: dropout of its own or of its adapters.

    Some of it has no module, only a value in the config, as in Falcon's layers.
    """
    config = model.config.get_text_config().to_dict()
    values = [value for name, value in config.items() if "drop" in name]
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    has_value = any(isinstance(value, float) and value > 0 for value in values)
    return has_value or any(module.p > 0 for module in modules)


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The base model of a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def supports_cuda_graph(model: torch.nn.Module) -> bool:
    """Whether nothing that a model does depends on what it computes.

    transformers says so of each architecture. Mixtures of experts are left out: which experts work
    depends on the tokens.
    """
    base = base_of(model)
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    # transformers keeps a mixture's experts in one tensor of three dimensions
    has_experts = any(parameter.dim() == 3 for parameter in base.parameters())
    return never_waits_for_gpu(base) and takes_positions and not has_experts


def layers_support_cuda_graph(model: torch.nn.Module) -> bool:
    """The same, for a model whose layers get token ids; a multimodal one hands them embeddings."""
    base = base_of(model)
    # the decoder is the whole model below the output layer
    return supports_cuda_graph(base) and base.base_model is text_part(base)


def cuda_graph(step: Callable) -> Callable:
    """The CUDA graph of a function that has run before, or the function if there can be none.

    The graph reads and writes the same memory each time, so its inputs must be changed in place.
    """
    if not torch.cuda.is_available():
        return step
    # recording runs nothing: the kernels are noted, and `replay` starts them all at once
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = step()
    except RuntimeError as error:
        print_no_graph(error)
        return step

    def replay():
        graph.replay()
        return output

    return replay


def print_no_graph(error: RuntimeError) -> None:
    """Print that there is no CUDA graph, and why, be it for lack of memory: steps take longer."""
    print(f"no CUDA graph, so steps take longer: {first_line(error)[:150]}")


class CudaGraphCallback(TrainerCallback):
    """Before a training on small batches of packed rows, make its layers a CUDA graph.

    It goes from the token ids to the last hidden state, forward and backward. The loss is left out,
    as it waits for the GPU. Layers may be recomputed in it, if that restores no random numbers.
    When the training ends, the graph is let go of: it works in gigabytes of its own, and autograd's
    nodes, which Python's garbage collector cannot see through, lead from it back to the model.
    """

    def __init__(self) -> None:
        """No graph is recorded."""
        self.take_out: Callable[[], None] | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Record the layers of the decoder, if batches always have one shape."""
        shape = (args.per_device_train_batch_size, args.max_length)  # [rows, tokens]
        packed = "seq_lengths" in getattr(train_dataloader.dataset, "column_names", [])
        # restoring the random state waits for the GPU, which a graph cannot
        recomputes, options = checkpointing_of(args)
        restores = recomputes and options.get("preserve_rng_state", True)
        if not packed or uses_dropout(model) or restores:
            return
        small = is_small_batch(*shape, args.world_size)
        if not small or model.device.type != "cuda" or not layers_support_cuda_graph(model):
            return
        dtype = dtype_of(args)
        # cache_enabled=False: a cached cast would be memory of another graph
        autocast = torch.autocast("cuda", dtype, dtype != torch.float32, cache_enabled=False)
        try:
            with autocast:
                self.take_out = graph_layers(text_part(model.get_base_model()), shape)
        except RuntimeError as error:
            print_no_graph(error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the decoder its own forward back."""
        if self.take_out is not None:
            self.take_out()
        self.take_out = None


class Layers(torch.nn.Module):
    """A decoder as a function of tensors alone, which is what a graph can be made of."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.decoder_forward = decoder.forward

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden state, [rows, tokens, width], for ids and positions, [rows, tokens]."""
        output = self.decoder_forward(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        )
        return output.last_hidden_state


def graph_layers(decoder: torch.nn.Module, shape: tuple[int, int]) -> Callable[[], None]:
    """Make the forward of a decoder a graph for ids of this shape, [rows, tokens].

    Batches with fewer rows are filled up. Those with more rows, another length or an attention
    mask, and those that need no gradient, are computed as before. Returns a function that takes the
    graph out again.
    """
    # warm-up and recording run a forward and a backward pass on these ids
    rows, tokens = shape
    layers = Layers(decoder).train()
    decoder.train()
    ids = torch.zeros(shape, dtype=torch.long, device=decoder.device)
    # Two examples a row: a row with a single one gets another mask.
    positions = torch.arange(tokens, device=decoder.device) % (tokens // 2 + 1)
    # The adapter's gradients come from the stream that recorded them, which is no mistake here.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    inputs = (ids, positions.repeat(rows, 1))
    replay = torch.cuda.make_graphed_callables(layers, inputs, num_warmup_iters=1)
    for parameter in layers.parameters():
        if parameter.requires_grad:
            # A copy: the next batch overwrites the gradient that belongs to the graph.
            parameter.register_hook(torch.clone)

    def forward(
        input_ids: Any = None,  # a tensor [rows, tokens]
        attention_mask: Any = None,
        position_ids: Any = None,  # a tensor [rows, tokens]
        **others: Any,
    ) -> Any:
        has_both = input_ids is not None and position_ids is not None
        same_shape = has_both and input_ids.shape[1] == tokens and len(input_ids) <= rows
        if not same_shape or attention_mask is not None or not torch.is_grad_enabled():
            return layers.decoder_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **others,
            )
        missing = (0, 0, 0, rows - len(input_ids))  # rows at the end of the last batch
        filled = [torch.nn.functional.pad(ids, missing) for ids in (input_ids, position_ids)]
        return BaseModelOutputWithPast(last_hidden_state=replay(*filled)[: len(input_ids)])

    decoder.forward = forward

    def take_out() -> None:
        decoder.forward = layers.decoder_forward

    return take_out
