"""Published networks: the presets' inventories, part by part, and the network that takes them."""

from __future__ import annotations

import functools
import logging
import math
import re
from pathlib import Path

import pytest
import torch

from pyrosome.checkpoint.names import expected_tensors, official_bytes, official_storage
from pyrosome.config import ModelConfig
from pyrosome.errors import RequestError
from pyrosome.llm import load_model
from pyrosome.model.build import Network
from pyrosome.model.numerics import EXACT
from tests.checkpoint.files import SHARD, copied, read_entries, rewrite

DATA = Path(__file__).parent.parent / "data"
FLASH, FLASH_0731, PRO = (ModelConfig.preset(n) for n in ("flash", "flash-0731", "pro"))


@functools.cache
def sizes(config: ModelConfig, num_stages: int = 0) -> dict[str, int]:
    """Weights of each tensor; tables of expert numbers are none."""
    expected = expected_tensors(config, num_stages).items()
    return {n: math.prod(s.shape) for n, s in expected if s.kind != "table"}


def total(config: ModelConfig, pattern: str, num_stages: int = 0) -> int:
    return sum(n for name, n in sizes(config, num_stages).items() if re.search(pattern, name))


# Counts.


def test_the_0731_payload_to_the_byte():
    stored = list(official_storage(FLASH_0731, 3))
    assert len(stored) == len({name for name, *_ in stored}) == 72_317
    assert official_bytes(FLASH_0731, 3) == 166_878_536_440


def test_the_preview_and_0731_share_their_trunk():
    assert list(official_storage(FLASH, 0)) == list(official_storage(FLASH_0731, 0))
    trunk = [s for s in official_storage(FLASH_0731, 3) if not s[0].startswith("mtp.")]
    assert trunk == list(official_storage(FLASH, 0))


PARTS = [
    ("one expert", r"layers\.5\.ffn\.experts\.7\.", 25_165_824),
    ("all experts", r"^layers.*\.ffn\.experts\.", 277_025_390_592),
    ("shared experts", r"^layers.*shared_experts", 1_082_130_432),
    ("attention of a layer", r"layers\.1\.attn\.(w|q_norm|kv_norm|attn_sink)", 106_956_352),
    ("compressor and indexer of a CSA layer", r"layers\.2\.attn\.(compressor|indexer)", 19_142_272),
    ("compressor of an HCA layer", r"layers\.3\.attn\.(compressor|indexer)", 4_260_352),
    ("all compressors and indexers", r"^layers.*attn\.(compressor|indexer)", 487_194_752),
    ("gates", r"^layers.*ffn\.gate\.", 45_099_008),
    ("hyper-connections and norms of layers", r"^layers.*(hc_|(attn|ffn)_norm)", 34_171_154),
    ("embedding and head", r"^(embed|head)\.", 1_059_061_760),
    ("last norm and collapse", r"^(norm|hc_head)", 69_637),
    ("the trunk", r"", 284_332_240_471),
]


@pytest.mark.parametrize(("part", "pattern", "count"), PARTS, ids=[p[0] for p in PARTS])
def test_parameters_of_flash_part_by_part(part, pattern, count):
    assert total(FLASH, pattern) == count


def test_parts_add_up_to_the_trunk():
    attention = 43 * 106_956_352
    whole = {"all experts", "shared experts", "all compressors and indexers", "gates", "embedding and head"}
    whole |= {"hyper-connections and norms of layers", "last norm and collapse"}
    assert attention + sum(count for part, _, count in PARTS if part in whole) == 284_332_240_471


def test_parameters_of_draft_heads_and_of_pro():
    assert total(FLASH, r"^mtp\.", 1) == 6_610_048_891
    assert total(FLASH_0731, r"^mtp\.", 3) == 19_845_850_983
    assert total(PRO, r"") == 1_572_997_201_763


@pytest.mark.parametrize(("config", "active"), [(FLASH, 13_270_021_714), (PRO, 48_852_257_886)], ids=["flash", "pro"])
def test_active_parameters_of_a_token(config, active):
    """Its experts, everything beside them and the head.

    The figure leaves out the embedding, biases that only choose experts, and the last norm and collapse.
    """
    experts = total(config, r"ffn\.experts\.")
    chosen = experts * config.num_experts_per_tok // config.n_routed_experts
    left_out = total(config, r"^(embed|norm|hc_head)|gate\.bias")
    assert total(config, r"") - experts + chosen - left_out == active


# The network that takes them.


def places(network: Network) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of everything the network keeps outside its expert bank."""
    found = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        name = re.sub(r"hc_(attn|ffn|head)\.(fn|base|scale)$", r"hc_\1_\2", name)
        name = re.sub(r"\.value$", ".weight", name)
        if not name.startswith(("bank.", "rotary.")):
            found[name] = tuple(tensor.shape)
    return found


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("drafts", [False, True])
def test_the_network_has_a_place_for_every_tensor_and_no_other(config, drafts):
    network = Network(config, EXACT, drafts=drafts)
    inventory = {n: s.shape for n, s in expected_tensors(config, int(drafts)).items() if ".ffn.experts." not in n}
    assert places(network) == inventory
    assert all(t.device.type == "meta" for t in network.parameters())
    shapes = {s.shape for n, s in expected_tensors(config, int(drafts)).items() if ".ffn.experts." in n}
    assert shapes == set(network.bank.shapes.values())
    assert (network.bank.num_experts, len(network.layers)) == (config.n_routed_experts, config.num_hidden_layers)


# Checkpoints of the 0731 release: the trunk runs, its DSpark head is left out, and both are said.


@pytest.mark.parametrize(("name", "num_stages"), [("bf16", 3), ("fp8fp4", 2)])
def test_a_0731_checkpoint_runs_without_its_draft_head_and_says_so(name, num_stages, caplog):
    with caplog.at_level(logging.WARNING, "pyrosome"):
        model = load_model(DATA / "golden_dspark" / name)
    assert f"has a DSpark head of {num_stages} stages, which this version leaves out" in caplog.text
    assert model.config.release == "0731" and not model.has_drafts and len(model.network.mtp) == 0
    logits = model.logits(range(2, 60))
    assert logits.shape == (58, model.config.vocab_size) and torch.isfinite(logits).all()
    with pytest.raises(RequestError, match="has a DSpark head, which this version does not run yet; use `logits`"):
        model.draft_logits([1, 2, 3])
    assert not any("mtp" in n for n, _ in [*model.network.named_parameters(), *model.network.named_buffers()])
    assert not any(layer.startswith("mtp") for layer, _ in model.network.bank._stacks)


def test_a_trunk_s_logits_do_not_depend_on_its_draft_head(tmp_path):
    path = copied(tmp_path, "golden_dspark/fp8fp4")
    with_head = load_model(path).logits(range(40))
    rewrite(path, dict.fromkeys(n for n in read_entries(path / SHARD) if n.startswith("mtp.")))
    assert torch.equal(load_model(path).logits(range(40)), with_head)


def test_a_preview_checkpoint_without_its_draft_head_says_so(tmp_path):
    path = copied(tmp_path, "golden/bf16")
    assert load_model(path).has_drafts
    rewrite(path, dict.fromkeys(n for n in read_entries(path / SHARD) if n.startswith("mtp.")))
    model = load_model(path)
    assert not model.has_drafts and model.logits([1, 2]).shape[0] == 2
    with pytest.raises(RequestError, match="has no MTP tensors; use `logits`"):
        model.draft_logits([1, 2, 3])
