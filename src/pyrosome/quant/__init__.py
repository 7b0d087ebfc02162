"""Number formats: weights as stored, activations as trained, cache rows as kept."""

from pyrosome.quant.activation import (
    hadamard,
    quantize_activation,
    round_activation,
    round_index,
    round_kv,
    simulate_fp4,
    simulate_fp8,
    unchanged,
)
from pyrosome.quant.e8m0 import ceil_pow2, e8m0_to_float
from pyrosome.quant.formats import FORMATS, Format, QuantTensor, format_of, fp4_to_fp8, register_format
from pyrosome.quant.rows import RowFormat, index_rows, kv_rows

__all__ = [
    "FORMATS",
    "Format",
    "QuantTensor",
    "RowFormat",
    "ceil_pow2",
    "e8m0_to_float",
    "format_of",
    "fp4_to_fp8",
    "hadamard",
    "index_rows",
    "kv_rows",
    "quantize_activation",
    "register_format",
    "round_activation",
    "round_index",
    "round_kv",
    "simulate_fp4",
    "simulate_fp8",
    "unchanged",
]
