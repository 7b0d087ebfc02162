"""A name for what cached rows depend on: configuration, weights, numerics and row format."""

from __future__ import annotations

import hashlib
import json

from pyrosome.checkpoint.index import CheckpointIndex

SAMPLED_TENSORS = 2_000  # evenly spaced among their sorted names, whatever shard they are in
SAMPLE_BYTES = 512  # at the beginning, the middle and the end of each


def fingerprint(index: CheckpointIndex, numerics: str, kv_format: str) -> str:
    """64 hex digits, equal wherever the checkpoint lies and however it is cut into shards.

    Of the configuration, of every tensor's name, dtype and shape, and of samples of at most 2,000 tensors' bytes:
    another training run or release differs in them, a single changed weight elsewhere may not.  It guards against
    mistaking one model for another, not against somebody who forges a checkpoint.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps([index.config.to_dict(), numerics, kv_format], sort_keys=True).encode())
    names = sorted(index.tensors)
    digest.update(json.dumps([[n, index.tensors[n].dtype, *index.tensors[n].shape] for n in names]).encode())
    step = max(1, -(-len(names) // SAMPLED_TENSORS))
    by_file: dict[str, list[str]] = {}
    for name in names[::step]:
        by_file.setdefault(str(index.tensors[name].file), []).append(name)
    samples: dict[str, bytes] = {}
    for path, held in by_file.items():
        with open(path, "rb") as f:
            for name in held:
                t = index.tensors[name]
                middle = max(t.begin, (t.begin + t.end - SAMPLE_BYTES) // 2)
                parts = []
                for at in (t.begin, middle, max(t.begin, t.end - SAMPLE_BYTES)):
                    f.seek(at)
                    parts.append(f.read(min(SAMPLE_BYTES, t.end - at)))
                samples[name] = b"".join(parts)
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()
