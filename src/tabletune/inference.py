"""The models of a run, ready to be asked: base and adapter as one, the merged one, and how much they take at once."""

import gc
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .bits import bnb, dequantize_4bit
from .models import attach_adapter, load_base, load_model, room_gib, skeleton
from .recording import can_be_recorded, recorded
from .run import StageError, read_json


def find_merged(run, run_dir):
    """The folder of the merged model, which notebook 3 leaves in `runs/` where Google Drive is too small.

    None if the run is of a kind that several machines share, and another one has it.
    """
    places = [run / "merged", Path("runs") / run.name / "merged"]
    there = [place for place in places if place.exists()]
    shared = str(run_dir).startswith(("drive:", "hub:"))
    return there[0] if there else None if shared else places[0]


def load_adapted(adapter, base_model, revision, dtype, attn_implementation="auto"):
    """The base model as it was trained on, with the adapter of a folder beside it: a PeftModel, for inference."""
    quantization = read_json(adapter / "provenance.json", "02_finetune_qlora").get("quantization", "nf4")
    base = load_base(base_model, revision, dtype, attn_implementation, quantization=quantization)
    adapted = attach_adapter(base, adapter)
    unpack_weights(adapted)
    return adapted


class Linear(torch.nn.Linear):
    """A linear layer that computes in the dtype of its weight, whatever that of its input, as bitsandbytes' do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def unpack_weights(model):
    """Keep the 4-bit weights of a model as the numbers that they stand for, in place, if there is room for that.

    bitsandbytes unpacks all weights at every forward pass, that is for each token of an answer, and computes with the
    result. Unpacked once they give the same logits, bit for bit on a CPU, and answers take less time. At least half of
    the free memory is left alone. Returns whether it was done.
    """
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]
    size = sum(layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize for _, _, layer in layers) / 2**30
    if not layers or 2 * size > room_gib():
        return False
    for parent, name, layer in layers:
        state = layer.weight.quant_state
        state.dtype = layer.compute_dtype
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(dequantize_4bit(layer.weight.data, state), requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)
    return True


def load_merged(folder, adapter, base_model, revision, dtype, attn_implementation="auto"):
    """The merged model as anyone would load it, and what it had to be put into to fit: (model, None or "NF4").

    Without its `folder` it is merged again, in memory, from the base model and the folder of the `adapter`. Raises
    StageError if it does not fit, and cannot be loaded in 4 bits, as those are made from files.
    """
    gc.collect()  # what was let go of, in circles, is still there
    torch.cuda.empty_cache()
    size = skeleton(AutoConfig.from_pretrained(folder or base_model, revision=None if folder else revision))
    size, room = size.num_parameters() * dtype.itemsize / 2**30, min(gather_object([room_gib()]))
    if folder and size <= room:
        return load_model(folder, None, dtype, attn_implementation), None
    if folder:
        print(f"The merged model takes {size:.1f} GiB of memory, and there are {room:.1f}: it is evaluated in 4 bits.")
        return load_base(folder, None, dtype, attn_implementation), "NF4"
    if size > room:
        raise StageError(
            f"The merged model takes {size:.1f} GiB of memory, and there are {room:.1f} GiB. To have it evaluated in "
            "4 bits, run 03_merge_adapter where its files can stay, or run this notebook on a larger machine."
        )
    model = load_model(base_model, revision, dtype, attn_implementation)
    return attach_adapter(model, adapter).merge_and_unload(), None


@torch.no_grad()
def bytes_a_token(model, with_logits=True):
    """What a token takes while it is read: what the cache keeps of it, and logits, as computed and twice in fp32.

    Measured, as caches differ: keys and values of some layers, or states that do not grow.
    """

    def read(tokens):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        output = model(input_ids=ids, use_cache=True)
        layers = getattr(output.get("past_key_values"), "layers", [])
        kept = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in kept), output.logits

    (few, _), (more, logits) = read(8), read(16)
    return (more - few) // 8 + with_logits * logits.shape[-1] * (logits.element_size() + 4 + 4)


def rows_that_fit(model, length, most, with_logits=True):
    """How many rows of `length` tokens, up to `most`, have room in memory beside `model`.

    A fifth of the free memory is left alone. An answer needs no logits but the last. Of several processes, the one with
    the least room decides.
    """
    if most <= 1:
        return 1
    model.eval()
    room = 0.8 * room_gib() * 2**30 / (length * max(1, bytes_a_token(model, with_logits)))
    return min(gather_object([max(1, min(most, int(room)))]))


# --- answers, a token at a time


def fixed_cache(model, length):
    """A cache with room for `length` tokens, or None where the model takes no such cache, or there is no GPU.

    It is made of the layers that the model's own cache has: keys and values of every token. That of a sliding window
    may keep them all, since the mask leaves out what is too far back.
    """
    if model.device.type != "cuda" or not can_be_recorded(model):
        return None
    with torch.no_grad():
        own = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    layers = getattr(own.get("past_key_values"), "layers", [])
    usual = layers and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return Cache(layers=[StaticLayer(length) for _ in layers]) if usual else None


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
    """The loop of `generate` over a `fixed_cache`, for its argument `custom_generate`: same tokens, recorded steps.

    `input_ids` are [rows, tokens], padded on the left; `prepared` is what else `generate` has for the model. Returns
    them with the answers, [rows, tokens and new ones].
    """
    begin, end, pad = input_ids.shape[1], generation_config.max_length, generation_config.pad_token_id
    ids = torch.nn.functional.pad(input_ids, (0, end - begin), value=pad)
    positions, seen = prepared.pop("position_ids"), prepared["attention_mask"]
    prepared["attention_mask"] = torch.nn.functional.pad(seen, (0, end - begin), value=1)  # what comes later is masked
    logits = model(input_ids=input_ids, position_ids=positions, **prepared).logits[:, -1].float()
    token, position = input_ids[:, -1:].clone(), positions[:, -1:] + 1
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def step():
        logits = model(input_ids=token, position_ids=position, **prepared).logits[:, -1].float()
        position.add_(1)
        return logits

    for now in range(begin, end):
        scores = logits_processor(ids[:, :now], logits)
        new = scores.softmax(-1).multinomial(1)[:, 0] if generation_config.do_sample else scores.argmax(-1)
        ids[:, now] = new.masked_fill(done, pad)
        done |= stopping_criteria(ids[:, : now + 1], None)
        if done.all():
            break
        token.copy_(ids[:, now : now + 1])
        if now == begin + 1:
            step = recorded(step)
        logits = step()
    return ids[:, : now + 1]
