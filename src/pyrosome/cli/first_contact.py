"""What is said to those who come without a model: what runs now, and what the official weights need."""

from __future__ import annotations

import os

BUILTIN = "builtin:nano"
MODEL_HELP = f"Checkpoint directory, single file, OWNER/NAME as it was pulled, or {BUILTIN}."


def official_note(command: str) -> str:
    """What can be done now, the `command` that takes official weights, and their bytes, from the loader's inventory."""
    from pyrosome.checkpoint.names import official_bytes
    from pyrosome.config import ModelConfig

    flash, dspark = ModelConfig.preset("flash"), ModelConfig.preset("flash-0731")
    releases = (
        ("DeepSeek-V4-Flash", official_bytes(flash, 1), official_bytes(flash, 1)),
        ("DeepSeek-V4-Flash-0731", official_bytes(dspark, 3), official_bytes(dspark, 0)),  # its draft head is left out
    )
    lines = [
        f"No model was named, so this is {BUILTIN}: a small network of the true architecture in the official layout. "
        "It was taught ledgers of short records, small sums and one tool, and knows nothing of anything else.",
        "What can be done now:",
        '    pyrosome ask builtin:ledger "? falcon"    find a record in a document, and see where it looked',
        "    pyrosome chat    ask for 37 + 25, and see it think",
        "    pyrosome doctor    check this machine and this installation",
        f"    pyrosome inspect {BUILTIN}    see what a checkpoint holds",
        "For the official weights, name a directory with config.json, tokenizer.json, the index and all shards:",
        f"    pyrosome {command}",
        "    pyrosome pull deepseek-ai/DeepSeek-V4-Flash    fetch them, once it is known whether they fit",
    ]
    for title, disk, memory in releases:
        lines.append(
            f"    {title}: {disk:,} bytes on disk ({disk / 2**30:.0f} GiB), {memory / 2**30:.0f} GiB of memory: "
            "weights are held as stored"
        )
    if here := machine_memory():
        lines.append(f"    this machine has {here / 2**30:.0f} GiB of memory")
    return "\n".join(lines)


def machine_memory() -> int:
    """Bytes of memory in this machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
