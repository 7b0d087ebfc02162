"""`pyrosome doctor`: what it finds, and that it finds what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from pyrosome.cli import machine, recorded
from pyrosome.cli import self_test as tested
from pyrosome.cli.doctor import choices
from pyrosome.cli.self_test import NEW_TOKENS, PROMPTS, fingerprint, prompt_ids, record, self_test
from pyrosome.llm import load_model
from pyrosome.ops.seam import OPS
from tests.checkpoint.files import DATA
from tests.cli.sessions import REAL, piped


@pytest.fixture
def nano():
    return load_model("builtin:nano", numerics="exact")


def failed(findings):
    return {f["check"] for f in findings if not f["ok"]}


def test_the_built_in_model_answers_as_recorded(nano):
    findings = self_test(nano, "builtin:nano")
    assert len(findings) == 3 * len(recorded.CASES) == 9 and failed(findings) == set()
    assert all(len(c["answer"]) == len(c["logprobs"]) == NEW_TOKENS for c in recorded.CASES)
    assert all(c["prompt"].endswith(f["prompt"].removeprefix("... ")) and len(f["prompt"]) < 60
               for c, f in zip(recorded.CASES, findings[::3], strict=True))  # fmt: skip
    config = nano.config
    assert max(len(c["ids"]) for c in recorded.CASES) > max(128, 4 * config.index_topk, config.sliding_window)


def test_a_changed_weight_is_found_by_the_recorded_answers(nano):
    with torch.no_grad():
        nano.network.hc_head.fn.mul_(1.5)
    assert failed(self_test(nano, "builtin:nano")) == {"as recorded"}


def test_a_small_change_of_a_logprob_is_found(nano, monkeypatch):
    cases = json.loads(json.dumps(recorded.CASES))
    cases[2]["logprobs"][-1] += 0.01
    monkeypatch.setattr(recorded, "CASES", cases)
    (finding,) = (f for f in self_test(nano, "builtin:nano") if not f["ok"])
    assert finding["check"] == "as recorded" and cases[2]["prompt"].endswith(finding["prompt"].removeprefix("... "))


def test_a_logit_that_is_not_finite_is_found(nano):
    step = type(nano.runner(1, 1)).step

    def spoilt(self, spans, **kwargs):
        rows = [r.clone() for r in step(self, spans, **kwargs)]
        rows[0][-1, 7] = float("inf")
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(nano.runner(1, 1)), "step", spoilt)
        assert "finite" in failed(self_test(nano, "builtin:nano"))


def test_a_route_that_gives_other_logits_is_found(nano):
    logits = nano.logits
    nano.logits = lambda ids, cuts=None: logits(ids, cuts) * 1.001
    assert failed(self_test(nano, "builtin:nano")) == {"whole = token by token"}


def test_answers_recorded_with_other_weights_are_not_compared(nano, monkeypatch):
    monkeypatch.setattr(recorded, "WEIGHTS", "of another release")
    assert failed(self_test(nano, "builtin:nano")) == {"as recorded"}


def test_what_is_recorded_are_clear_answers_to_one_prompt_of_each_task(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(tested, "NUM_TRIED", 2)
    monkeypatch.setattr(tested, "SAFE_MARGIN", 0.0)
    record(tmp_path / "recorded.py")
    told: dict = {}
    exec((tmp_path / "recorded.py").read_text(encoding="utf-8"), told)
    assert told["WEIGHTS"] == fingerprint(nano.path) and len(told["CASES"]) == 3
    for case in told["CASES"]:
        assert case["ids"] == prompt_ids(nano, case["prompt"])
        rows = nano.logits([*case["ids"], *case["answer"]])[len(case["ids"]) - 1 : -1].log_softmax(-1)
        assert rows.argmax(-1).tolist() == case["answer"]
        assert rows.max(-1).values.tolist() == pytest.approx(case["logprobs"], abs=1e-3)
    monkeypatch.setattr(tested, "SAFE_MARGIN", 1e6)
    with pytest.raises(RuntimeError, match="asked for ledger, the model is nowhere surer"):
        record(tmp_path / "other.py")
    assert not (tmp_path / "other.py").exists()


def test_any_checkpoint_is_tested_by_its_routes_with_a_tokenizer_or_without():
    model = load_model(DATA / "golden" / "bf16", numerics="exact")
    ids = prompt_ids(model, PROMPTS[2])
    assert ids[0] == model.config.bos_token_id and max(ids) < model.config.vocab_size
    findings = self_test(model, "golden")
    assert len(findings) == 2 * len(PROMPTS) and failed(findings) == set()


def test_every_op_says_what_it_runs_and_why(monkeypatch):
    found = choices()
    assert {o["op"] for o in found} == set(OPS)
    assert all(o["chosen"] in o["versions"] and not o["error"] for o in found)
    monkeypatch.setattr(OPS["compress"], "choice", "imagined")
    refused = [o for o in choices() if o["error"]]
    assert {o["op"] for o in refused} == {"compress"} and "imagined" in refused[0]["error"]


def test_the_whole_report_is_one_object(tmp_path):
    done = piped(tmp_path, "doctor", "--json", program=REAL)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], done.stderr.decode()
    assert len(report["self_test"]) == 3 * len(recorded.CASES) and report["versions"]["torch"]
    assert report["memory"]["total"] > 0 and report["disk"]["free"] > 0 and report["cpu"]["cores"] >= 1


def test_a_version_that_was_asked_for_and_cannot_run_fails_with_status_1(tmp_path):
    done = piped(tmp_path, "doctor", program=REAL, PYROSOME_OPS="compress:imagined", PYROSOME_TYPO="1")
    shown = done.stdout.decode()
    assert done.returncode == 1 and "FAIL" in shown and "'imagined' was asked for" in shown
    assert "PYROSOME_OPS=compress:imagined" in shown and "PYROSOME_TYPO is set, and nothing here reads it" in shown


def test_a_bad_model_is_one_line_and_status_2(tmp_path):
    done = piped(tmp_path, "doctor", "/no/such/model", program=REAL)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pyrosome: /no/such/model does not exist")


@pytest.mark.parametrize(
    ("info", "model", "flags"),
    [
        ("model name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f\n", "Some CPU @ 2GHz", {"avx2", "avx512f"}),
        ("Features\t: fp asimd bf16\n", None, {"asimd", "bf16"}),
        ("", None, None),
    ],
)
def test_a_cpu_is_read_from_what_the_system_tells(tmp_path, info, model, flags):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(info)
    cpu = machine.cpu(tmp_path)
    assert cpu["model"] == model or (model is None and cpu["model"])
    assert flags == (None if cpu["flags"] is None else {f for f, there in cpu["flags"].items() if there})
