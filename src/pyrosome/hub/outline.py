"""A checkpoint on a hub as its headers tell it: megabytes travel, and what 160 GB hold is known.

Configuration, index and the header of every shard are asked for by range; then it is the same index as of files here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pyrosome.checkpoint.headers import PREFIX_BYTES, TensorInfo, header_bytes, parse_header
from pyrosome.checkpoint.index import INDEX_NAME, CheckpointIndex, gathered, parse_weight_map
from pyrosome.config import ModelConfig
from pyrosome.errors import CheckpointError, FetchError
from pyrosome.hub.remote import Hub, Listing, RemoteFile

CONFIG = "config.json"
# Beside the shards: what a checkpoint is, what its tokenizer is, how it samples by default, and under what terms.
BESIDE = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", INDEX_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt",
)  # fmt: skip
_FOLDER, _TEXTS = "encoding", frozenset({".json", ".jsonl", ".txt", ".md"})  # the dialect's cases; never its programs
_GUESS_BYTES = 1 << 17  # most headers are within the first so many bytes of a shard
_AT_ONCE = 8
_SMALL_BYTES = 64 << 20  # no configuration or index is larger


def needed_files(listing: Listing, shards: list[str]) -> tuple[RemoteFile, ...]:
    """What of a repository is fetched: small files first, then shards; never a program."""
    small = [f for name, f in sorted(listing.files.items()) if name in BESIDE or _is_case(name)]
    return (*small, *(listing.files[name] for name in sorted(shards)))


def _is_case(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[0] == _FOLDER and len(path.parts) > 1 and path.suffix in _TEXTS


def remote_index(hub: Hub, listing: Listing) -> CheckpointIndex:
    """Configuration and tensor places of a checkpoint on a hub; paths in it begin with OWNER/NAME.

    Raises:
        CheckpointError: and its kinds, as `open_checkpoint`; or it is not of this architecture.
        FetchError: something does not come, or is not what is listed.
    """
    root = Path(listing.repo)
    if CONFIG not in listing.files:
        raise CheckpointError(
            f"{listing.repo} has no {CONFIG} at commit {listing.commit[:12]}, so it is no checkpoint; check the name"
        )
    config = ModelConfig.from_dict(_object(_text(hub, listing, CONFIG), f"{root}/{CONFIG}"), source=f"{root}/{CONFIG}")
    placed = _placed(hub, listing)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = _reader(hub, listing)
        headers = dict(zip(placed, pool.map(read, placed), strict=True))
    shards = {root / name: names for name, names in placed.items()}
    return gathered(root, config, shards, lambda path: headers[path.name])


def _placed(hub: Hub, listing: Listing) -> dict[str, set[str] | None]:
    """Each shard, with the tensors the index places in it (None without an index)."""
    if INDEX_NAME not in listing.files:
        files = [n for n in listing.files if n.endswith(".safetensors") and "/" not in n]
        if len(files) == 1:
            return {files[0]: None}
        raise CheckpointError(
            f"{listing.repo} has no {INDEX_NAME} and {len(files)} .safetensors files: not a checkpoint in the "
            "official layout; choose a repository that has one"
        )
    listed = parse_weight_map(_text(hub, listing, INDEX_NAME), f"{listing.repo}/{INDEX_NAME}")
    if absent := sorted(listed.keys() - listing.files.keys()):
        raise CheckpointError(
            f"the index of {listing.repo} names {len(absent)} shards that are not in it, {absent[0]} first; choose "
            "another revision"
        )
    return dict(listed)


def _reader(hub: Hub, listing: Listing) -> Callable[[str], dict[str, TensorInfo]]:
    def read(name: str) -> dict[str, TensorInfo]:
        file, path = listing.files[name], Path(listing.repo) / name
        front = hub.read(listing, file, 0, _GUESS_BYTES)
        end = PREFIX_BYTES + header_bytes(path, front[:PREFIX_BYTES], file.num_bytes)
        if end > len(front):
            front += hub.read(listing, file, len(front), end)
        return parse_header(path, front[PREFIX_BYTES:end], file.num_bytes)

    return read


def _text(hub: Hub, listing: Listing, name: str) -> str:
    file = listing.files[name]
    if file.num_bytes > _SMALL_BYTES:
        raise CheckpointError(f"{listing.repo}/{name} is listed with {file.num_bytes:,} bytes, which no such file has")
    try:
        return hub.read(listing, file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FetchError(f"{listing.repo}/{name} is not UTF-8 text ({error}); use another mirror") from None


def _object(text: str, source: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: holds a JSON {type(found).__name__}; {CONFIG} is a JSON object")
    return found
