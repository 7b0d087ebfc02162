"""What a device needs beside weights and rows: a step's own numbers, the driver's, the operating system's.

What an engine allocates for a step on a GPU is not the engine's to fix yet, so the formula here is an upper bound by
phases: residual streams are there throughout, and beside them either attention's numbers or the experts'.
"""

from __future__ import annotations

from pyrosome.config import CSA_RATIO, ModelConfig

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
SCORE_TOKENS = 256  # tokens whose index scores over the whole history are there at once


def step_bytes(config: ModelConfig, tokens: int, context: int, element_bytes: int, tensor_ranks: int = 1) -> int:
    """Bytes of one step's own numbers at its peak, at most, on one device.

    Args:
        tokens: of all spans together.
        element_bytes: of an activation: 2 on a GPU, 4 on a CPU.
        tensor_ranks: devices that share heads and output groups.
    """
    c = config
    streams = 2 * c.hc_mult * c.hidden_size  # those that go into a sub-block, and those that come out
    heads = 2 * c.num_attention_heads * c.head_dim  # queries and what attention answers
    index = c.index_n_heads * c.index_head_dim if CSA_RATIO in c.layer_ratios else 0
    shared_out = heads + c.o_groups * c.o_lora_rank + index
    attention = -(-shared_out // tensor_ranks) + c.q_lora_rank + c.head_dim
    # Each expert's gate, up and product, what went in and what comes out.  All may go to experts of one device.
    experts = c.num_experts_per_tok * (3 * c.moe_intermediate_size + 2 * c.hidden_size)
    scores = 4 * min(tokens, SCORE_TOKENS) * (context // CSA_RATIO) if index else 0
    return tokens * element_bytes * (streams + max(attention, experts)) + scores


def logit_bytes(config: ModelConfig, rows: int, tensor_ranks: int = 1) -> int:
    """Bytes of float32 logits after so many rows, and of the probabilities they become."""
    return 2 * 4 * rows * -(-config.vocab_size // tensor_ranks)


def device_system_bytes(num_devices: int) -> int:
    """Of an accelerator's memory, what no tensor gets."""
    return CONTEXT_BYTES + SLACK_BYTES + (LINK_BYTES if num_devices > 1 else 0)


def host_system_bytes(num_devices: int) -> int:
    """Of the host's memory, what neither weights nor rows get."""
    return HOST_BYTES + num_devices * RANK_HOST_BYTES
