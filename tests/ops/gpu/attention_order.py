"""Run as a module: in which order compiled kernels of attention add, where the compiler chooses it.

    python -m tests.ops.gpu.attention_order

Prints, as JSON for each capability: the layouts of tiles of scores whose rows are summed, and how many neighbouring
terms of a product a thread holds, which decides about what one matrix instruction adds.  Both are told of all kernels
over FP8 rows in every variant.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from pyrosome.ops import gpu
from pyrosome.ops.sparse_attention.triton import VARIANTS
from pyrosome.testing.calls.sparse_attention import calls

CAPABILITIES = (80, 89, 90, 100)  # of every kind of matrix instruction, and with and without FP8
CALLS = ("attention window + CSA, M = 1, context 4,096", "attention window + CSA, M = 512, context 4,096")


def tiles(launch: gpu.Launch, capability: int) -> str:
    """The kernel as the compiler has laid out its tiles, before it makes instructions of them."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    constants = {**launch.variant.constants, **dict(launch.constants)}
    names = [p.name for p in launch.kernel.params]
    signature = dict(zip(names, launch.signature, strict=False)) | dict.fromkeys(constants, "constexpr")
    fixed = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    target = GPUTarget("cuda", capability, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": launch.variant.warps, "num_stages": launch.variant.stages})
    source = ASTSource(launch.kernel, signature, fixed, aligned)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **vars(options)}
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, metadata)
    return str(module)


def main() -> None:
    chosen, found = [call for call in calls() if call.title in CALLS], {}
    for capability in CAPABILITIES:
        sums: set[str] = set()
        terms: set[str] = set()
        for launch in launches(chosen, capability):
            text = tiles(launch, capability)
            layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
            sums |= {layouts[name] for name in re.findall(r"\}\) : \(tensor<64x64xf32, (#\w+)>\)", text)}
            terms |= set(re.findall(r"kWidth = (\d+)", text))
        found[capability] = {"sums": sorted(sums), "terms": sorted(terms)}
    print(json.dumps(found))


def launches(chosen: list[Any], capability: int) -> list[gpu.Launch]:
    """Those that multiply: by default, and scores in every variant."""
    made = {}
    for variant in VARIANTS:
        for call in chosen:
            arguments, options = call.make(torch.device("meta"))
            with gpu.tracing(capability) as told, gpu.forced(weigh=variant), torch.no_grad():
                gpu.of(call.op)(*arguments, **options)
            made.update({(launch.kernel.__name__, launch.variant.name): launch for launch in told if launch.matrix})
    assert len(made) == 4
    return list(made.values())


if __name__ == "__main__":
    main()
