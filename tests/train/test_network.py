"""The network that trains is the network that serves."""

import pytest
import torch

from pyrosome.checkpoint.index import open_checkpoint
from pyrosome.engine.loaded import load_model
from pyrosome.errors import CheckpointError
from pyrosome.quant import QuantTensor
from pyrosome.testing.shapes import tiny
from pyrosome.train.batch import pack
from pyrosome.train.loss import losses
from pyrosome.train.network import (
    Masters,
    export,
    initial_tensors,
    load_masters,
    parameters_of,
    refresh,
    stored_form,
    trainable_network,
)
from pyrosome.train.recipe import LossRecipe
from pyrosome.train.samples import Encoded
from tests.networks import tokens

CONFIG = tiny((0, 4, 128), vocab_size=160)


@pytest.fixture(scope="module")
def masters():
    """Weights a few steps of noise away from the first ones, as training leaves them."""
    g = torch.Generator().manual_seed(5)
    made = Masters(CONFIG, dict(initial_tensors(CONFIG, 3)))
    for w in made.weights.values():
        w.add_(0.05 * torch.randn(w.shape, generator=g))
    return made


def test_first_values_depend_on_the_seed_and_the_name():
    one, again, other = (dict(initial_tensors(CONFIG, s)) for s in (1, 1, 2))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    deeper = dict(initial_tensors(tiny((0, 4, 128, 4), vocab_size=160), 1))
    assert torch.equal(one["layers.1.attn.wq_a.weight"], deeper["layers.1.attn.wq_a.weight"])


def test_every_weight_is_trained_by_one_of_the_two_rules(masters):
    adamw = set(masters.adamw)
    assert {"embed.weight", "head.weight", "norm.weight", "layers.1.attn.kv_norm.weight", "hc_head_scale"} <= adamw
    assert {"layers.0.hc_attn_base", "layers.0.hc_ffn_scale", "layers.2.attn.attn_sink", "mtp.0.enorm.weight"} <= adamw
    rest = masters.weights.keys() - adamw
    assert {"layers.0.hc_attn_fn", "layers.1.attn.compressor.ape", "layers.1.ffn.gate.weight", "hc_head_fn"} <= rest
    assert all(masters.weights[n].dim() in (2, 3) for n in rest)
    assert all(masters.weights[n].dim() == 3 for n in rest if ".experts." in n)


@pytest.mark.parametrize("layout", ["bf16", "fp8fp4"])
def test_an_export_holds_the_masters_in_the_official_layout(masters, tmp_path, layout):
    export(tmp_path, masters, layout, [])
    index = open_checkpoint(tmp_path)
    index.check().raise_if_bad()
    again = load_masters(tmp_path, CONFIG)
    for name, value in masters.named():
        form = stored_form(value, masters.specs[name], layout)
        expected = form.dequantize(torch.float32) if isinstance(form, QuantTensor) else form
        found = dict(again.named())[name]
        assert torch.equal(found.float(), expected.float()), name


@pytest.mark.parametrize("quantized", [False, True])
def test_trainers_logits_are_the_engines(masters, tmp_path, quantized):
    """Whole in the trainer; whole, in parts and token by token through the engine's cache."""
    ids = tokens(150)
    model = trainable_network(masters, quantized=quantized)
    refresh(parameters_of(model, masters), masters, quantized=quantized)
    ours = model.logits(model(pack([Encoded(ids, [1.0] * 150, [False] * 150, "t")]).step).streams).detach()
    # float32 masters: an export would round them to bfloat16, so compare where the values are the same.
    if quantized:
        export(tmp_path, masters, "fp8fp4", [])
        served = load_model(tmp_path, numerics="trained", kv_format="f32")
    else:
        rounded = Masters(CONFIG, {n: stored_form(v, masters.specs[n], "bf16") for n, v in masters.named()})
        model = trainable_network(rounded, quantized=False)
        ours = model.logits(model(pack([Encoded(ids, [1.0] * 150, [False] * 150, "t")]).step).streams).detach()
        export(tmp_path, rounded, "bf16", [])
        served = load_model(tmp_path, numerics="exact", kv_format="f32")
    for cuts in ([], [7, 64, 129], list(range(1, 150))):
        theirs = served.logits(ids, cuts)
        worst = (ours - theirs).abs().max().item()
        assert worst <= (2e-2 if quantized else 1e-4), f"{worst} with {len(cuts)} cuts"


def test_quantised_copies_hold_what_will_be_stored_and_gradients_reach_the_masters_names(masters):
    model = trainable_network(masters, quantized=True)
    parameters = parameters_of(model, masters)
    refresh(parameters, masters, quantized=True)
    for name, value in masters.stored("fp8fp4"):
        if name == "layers.1.attn.wq_b.weight":
            assert isinstance(value, QuantTensor)
            assert torch.equal(parameters[name], value.dequantize(torch.float32))
        if name == "layers.1.ffn.experts.2.w1.weight":
            assert torch.equal(parameters["layers.1.ffn.experts.w1"][2], value.dequantize(torch.float32))
    sample = Encoded(tokens(60), [0.0] + [1.0] * 59, [False] * 60, "t")
    losses(model, pack([sample]), LossRecipe(), 0.3).total.backward()
    # 60 tokens make no row of an HCA layer's compressor.
    reached = [p.grad for n, p in parameters.items() if not n.startswith("layers.2.attn.compressor")]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in reached)


def test_a_checkpoint_of_another_shape_is_refused(masters, tmp_path):
    export(tmp_path, masters, "bf16", [])
    with pytest.raises(CheckpointError, match=r"embed\.weight .*\(160, 64\).*\(200, 64\)"):
        load_masters(tmp_path, tiny((0, 4, 128), vocab_size=200))
    with pytest.raises(CheckpointError, match=r"layers\.3\.\S+ is missing"):
        load_masters(tmp_path, tiny((0, 4, 128, 4), vocab_size=160))
