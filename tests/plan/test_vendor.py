"""The hosting vendor's tables come out of its convention to three decimals, and so do the published checks of it."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pyrosome.config import ModelConfig
from pyrosome.errors import RequestError
from pyrosome.plan import vendor
from pyrosome.plan.inventory import Model
from pyrosome.plan.prices import configurations

GIB = 1 << 30
FLASH = ModelConfig.preset("flash")
CELLS = json.loads((Path(__file__).parents[1] / "data" / "planner" / "vendor_cells.json").read_text())


@pytest.fixture(scope="module")
def report():
    return vendor.report()


@pytest.fixture(scope="module")
def models():
    return {w: vendor.stored(w) for w in vendor.STAGES}


def test_all_cells_of_the_tables_are_reproduced_to_three_decimals(report):
    found = [(c["table"], c["name"], c["weights"], c["gpus"], c["mode"], c["predicted"]) for c in report["cells"]]
    expected = [(c["table"], c["name"], c["weights"], c["gpus"], c["mode"], c["max_concurrency"]) for c in CELLS]
    assert len(found) == 21
    assert found == expected


def test_the_list_is_what_was_published():
    text = (resources.files("pyrosome.plan") / "vendor_cells.toml").read_text(encoding="utf-8")
    rented = {c.name: c for c in configurations()}
    for cell, published in zip(tomllib.loads(text)["cell"], CELLS, strict=True):
        there = rented[cell["name"]]
        assert (cell["gb"], cell["gpus"], cell["listed"], there.usd_hour) == (
            published["gpu_gb"], published["gpus"], published["max_concurrency"], published["usd_per_hour"],
        )  # fmt: skip
        assert (there.machine().count, there.machine().device.vendor_gb) == (cell["gpus"], cell["gb"])
        assert there.nvlink or not cell["name"].endswith(".nvlink")


def test_a_block_is_a_page_of_each_stream_for_22_layers():
    assert vendor.block_bytes(FLASH) == 22 * (37_440 + 1_728 + 8_640) == 1_051_776
    assert vendor.num_blocks(FLASH, 1_048_576, 8192) == 4_096 + 262 + 2_051 + 1_041 == 7_450
    assert vendor.request_bytes(FLASH) == 7_835_731_200


@pytest.mark.parametrize(
    ("batched_tokens", "gib"), [(1, 4.04), (2048, 4.853), (4096, 5.668), (8192, 7.298), (16384, 10.558)]
)
def test_a_request_grows_with_what_is_prefilled_at_once(batched_tokens, gib):
    digits = 2 if batched_tokens == 1 else 3
    assert round(vendor.request_bytes(FLASH, batched_tokens=batched_tokens) / GIB, digits) == gib


def test_a_published_error_text_has_these_bytes():
    # vllm-project/vllm issue 44376: 30,000 tokens need 6.66 GiB, and the 5.44 GiB there are hold 13,528.
    needed = vendor.request_bytes(FLASH, 30_000, 16_384)
    assert f"{needed / GIB:.2f}" == "6.66"
    longest = vendor.request_bytes(FLASH, 13_528, 16_384)
    assert f"{longest / GIB:.2f}" == "5.44"
    assert vendor.request_bytes(FLASH, 13_529, 16_384) > longest == vendor.request_bytes(FLASH, 13_525, 16_384)


def test_a_published_start_of_eight_b200_is_met_within_a_quarter_percent():
    # vllm-project/vllm issue 51454: TP8, 0.95 of 178.35 GiB, 8,192 tokens at once, no drafts: 20.43.
    trunk = Model.of(FLASH, 0).stored_bytes
    predicted = vendor.sessions(178.35 * GIB, 8, trunk, vendor.request_bytes(FLASH), share=0.95)
    assert round(predicted, 2) == 20.39
    assert predicted == pytest.approx(20.43, rel=0.0025)


def test_the_shares_are_the_vendor_s_choices(models):
    payload = {w: model.stored_bytes for w, model in models.items()}
    each = vendor.request_bytes(FLASH)
    memory = np.array([[c["gpu_gb"], -1.0] for c in CELLS])
    taken = np.array([(c["max_concurrency"] * each + payload[c["weights"]] / c["gpus"]) / GIB for c in CELLS])
    share, reserve = np.linalg.lstsq(memory, taken, rcond=None)[0]
    assert (round(share, 6), round(reserve, 4)) == (0.900003, 2.5008)
    assert (vendor.MEMORY_SHARE, vendor.RESERVE_BYTES / GIB) == (0.9, 2.5)


def test_files_are_tensors_and_their_headers(models):
    w = {name: vendor.file_bytes(model, name) for name, model in models.items()}
    assert w["native"] - 159_609_485_896 == 7_740_232  # 69,187 tensors in 46 files
    assert f"{w['native'] / GIB:.2f}" == "148.66"  # as hubs show the size of the published files
    assert w["w4a16"] == pytest.approx(152.945e9, abs=1e6)
    assert w["bf16"] == pytest.approx(568.754e9, abs=5e6)


@pytest.mark.parametrize(("name", "dtype", "shape"), [("a", "F32", (1,)), ("b" * 77, "I8", (2, 3)), ("é", "I8", ())])
def test_a_header_is_as_long_as_one_that_is_written(tmp_path, name, dtype, shape):
    held = np.zeros(shape, {"F32": np.float32, "I8": np.int8}[dtype])
    safetensors.numpy.save_file({name: held}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    written = (tmp_path / "x.safetensors").stat().st_size - held.nbytes
    assert vendor._header([(name, dtype, shape)]) == written


def test_this_engine_holds_more_beside_each_cell_and_pipelines_most(report):
    for cell in report["cells"]:
        ours = cell["ours"]
        assert ours[cell["mode"]] >= int(cell["listed"])
        assert ours["pp"] > ours["tp"]
        assert ours["dp"] == 0 or cell["weights"] != "bf16"
    four = next(c for c in report["cells"] if c["name"] == "teslaa100-4" and c["weights"] == "native")
    assert four["ours"]["pp"] >= 3 * four["ours"]["tp"] >= 6 * 4


def test_every_cell_says_why_it_is_not_what_its_machine_holds(report):
    for cell in report["cells"]:
        assert cell["why"].startswith(cell["mode"] + ":")
        assert "charged 7.30 GiB, of which 45%" in cell["why"] and "4.04 GiB" in cell["why"]
        assert ("rows of all 43 layers" in cell["why"]) == (cell["mode"] == "pp")


def test_the_report_is_plain_data(report):
    assert json.loads(json.dumps(report)) == report
    assert "memory as the driver reports it" in report["basis"]
    assert set(report["cells"][0]) >= {"table", "name", "weights", "gpus", "mode", "predicted", "listed", "ours", "why"}


def test_weights_that_no_table_has_are_refused():
    with pytest.raises(RequestError, match="weights are 'fp8'; the vendor's tables have native, w4a16, bf16"):
        vendor.stored("fp8")
