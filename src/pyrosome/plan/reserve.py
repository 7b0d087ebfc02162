"""What a device needs beside weights and rows: a step's own numbers, the driver's, the operating system's.

On a CPU a step's own numbers are those of `plan.workspace`.  On a GPU the formula here is an upper bound of a step's
tensors by phases: residual streams are there throughout, and beside them either attention's numbers or the experts'.
It is held to what V4-Flash's steps allocate on the meta device, where kernels are not run and shapes are all there is.
"""

from __future__ import annotations

import dataclasses
import functools

from pyrosome.config import CSA_RATIO, ModelConfig
from pyrosome.plan.workspace import Spans, captured_bytes, prompt_step, step_workspace

GIB = 1 << 30
# A CUDA context with loaded kernels takes 0.3 to 0.6 GiB of a device before the first tensor.
CONTEXT_BYTES = GIB // 2
# Weights and pools are large and allocated once; what an allocator loses is the rest of its 2 MiB segments, and what
# a step's buffers leave between them.
SLACK_BYTES = GIB // 2
LINK_BYTES = GIB // 4  # buffers of collective operations, where there are several devices
# The operating system, a server and the Python process with torch, as `serve` leaves aside on a CPU too.
HOST_BYTES = 2 * GIB
RANK_HOST_BYTES = GIB  # of host memory for each accelerator: its driver's own, and buffers that transfers go through
KERNEL_BYTES = 32 << 20  # of partial sums, which few tokens have as many of
SCORE_TOKENS = 256  # tokens whose index scores over the whole history are there at once
CHOICE_BYTES = 12  # a chosen row's score and number, which every CSA layer keeps to the end of the step
ROUNDING = 8  # memory is lent in blocks up to an eighth larger than what is asked for
# Steps of single tokens are captured when their shape comes again: so many captures are kept, of no more sequences
# each, with no more bytes in all (`engine.graphs`).
CAPTURES, CAPTURED_TOKENS, CAPTURED_BYTES = 48, 64, 1 << 30
MANY = 64  # sequences of a step that are looked at one by one; more of them take in proportion


@dataclasses.dataclass(frozen=True, slots=True)
class CpuStep:
    """What decides a step's shapes on a CPU, beside the model and the lengths."""

    kv_format: str
    numerics: str
    num_drafts: int
    has_drafts: bool


def step_bytes(config: ModelConfig, tokens: int, context: int, element_bytes: int, tensor_ranks: int = 1) -> int:
    """Bytes of one step's own numbers at its peak, at most, on one device.

    Args:
        tokens: of all spans together.
        element_bytes: of an activation.
        tensor_ranks: devices that share heads and output groups.
    """
    c = config
    D, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    csa_layers = c.layer_ratios.count(CSA_RATIO)
    index = c.index_n_heads * c.index_head_dim if csa_layers else 0
    streams = 3 * c.hc_mult * D + 3 * D  # those that come in, turned ones, new ones; what two sub-blocks read
    inputs = c.q_lora_rank + 2 * c.head_dim + max(_compressed_width(c, r) for r in {0, *c.layer_ratios})
    # Queries before and after their norm, or they and what attention answers; what it is projected to.
    cut = 2 * heads + index + c.o_groups * c.o_lora_rank
    attention = inputs + -(-cut // tensor_ranks)
    # Each expert's gate, up and product, what went in and what comes out.  All may go to experts of one device.
    experts = c.num_experts_per_tok * (3 * c.moe_intermediate_size + 2 * D)
    numbers = tokens * element_bytes * (streams + max(attention, experts))
    chosen = tokens * csa_layers * min(c.index_topk, context // CSA_RATIO) * CHOICE_BYTES
    scores = 4 * min(tokens, SCORE_TOKENS) * (context // CSA_RATIO) if index else 0
    return numbers + numbers // ROUNDING + chosen + scores + KERNEL_BYTES


def _compressed_width(config: ModelConfig, ratio: int) -> int:
    """Channels that a layer's compressors read of a token."""
    if ratio == CSA_RATIO:
        return 4 * (config.head_dim + config.index_head_dim) + config.index_n_heads
    return 2 * config.head_dim if ratio else 0


@functools.lru_cache(maxsize=256)
def cpu_prompt_bytes(config: ModelConfig, tokens: int, context: int, about: CpuStep) -> int:
    """Bytes of the last step of a prompt of `context` tokens on the native CPU kernels (`plan.workspace`)."""
    return prompt_step(config, tokens, context, **dataclasses.asdict(about)).total_bytes


@functools.lru_cache(maxsize=1024)
def cpu_decode_bytes(config: ModelConfig, sequences: int, context: int, about: CpuStep) -> int:
    """Bytes of a step in which each sequence's last token and its drafts are computed, as `cpu_prompt_bytes`."""
    if not sequences:
        return 0
    walked, count = min(sequences, MANY), min(1 + about.num_drafts, context)
    spans = ((context - count, count),) * walked
    num_bytes = step_workspace(Spans(config, spans, context, every_row=True, **dataclasses.asdict(about))).total_bytes
    return -(-sequences * num_bytes // walked)


@functools.lru_cache(maxsize=256)
def cpu_captured_bytes(config: ModelConfig, sequences: int, context: int, about: CpuStep) -> int:
    """Bytes that captured steps of up to so many sequences hold, at most."""
    if not sequences:
        return 0
    spans = ((context - 1, 1),) * min(sequences, CAPTURED_TOKENS)
    return min(CAPTURED_BYTES, CAPTURES * captured_bytes(Spans(config, spans, context, **dataclasses.asdict(about))))


def logit_bytes(config: ModelConfig, rows: int, tensor_ranks: int = 1) -> int:
    """Bytes of float32 logits after so many rows, and of the probabilities they become."""
    return 2 * 4 * rows * -(-config.vocab_size // tensor_ranks)


def device_system_bytes(num_devices: int) -> int:
    """Of an accelerator's memory, what no tensor gets."""
    return CONTEXT_BYTES + SLACK_BYTES + (LINK_BYTES if num_devices > 1 else 0)


def host_system_bytes(num_devices: int) -> int:
    """Of the host's memory, what neither weights nor rows get."""
    return HOST_BYTES + num_devices * RANK_HOST_BYTES
