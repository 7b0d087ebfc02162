"""`bench.gpu` runs whole where there is no GPU, so that no line of it is new on a rented one."""

from __future__ import annotations

import pytest
import torch

from bench import gpu


def test_it_runs_on_the_cpu_from_end_to_end(capsys):
    assert gpu.main(["--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count(" apart, ") == 4 and "TOO FAR" not in said
    assert "prefill of 512 tokens" in said and said.count("decode at") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_logits_too_far_apart_fail_the_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "EXACT", 1e-12)
    assert gpu.main(["--quick", "--device", "cpu"]) == 1
    assert "FAILED: bf16 (exact)" in capsys.readouterr().err


def test_random_weights_are_the_official_tensors_and_finite():
    model = gpu.network(gpu.quick(), torch.device("cpu"))
    for parameter in model.parameters():
        assert torch.isfinite(parameter.float()).all()
    weights = model.bank.weights("layers.1")
    assert (weights.w1.format, model.layers[0].attn.wq_a.value.format) == ("fp4", "fp8")
