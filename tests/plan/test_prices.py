"""Price lists: the vendor's, and users' own, read strictly; a price is never invented."""

from __future__ import annotations

import pytest

from pyrosome.errors import RequestError
from pyrosome.plan.hardware import machine
from pyrosome.plan.prices import configurations, listed, priced

OWN = """
source = "our own quotes"

[[configuration]]
name = "two"
gpu = "h200:2"
cpu = "2xepyc-9654"
ram = "1T"
nvme = "8T"
usd_hour = 7

[[configuration]]
name = "dear"
gpu = "2xh200"
usd_hour = 9.99
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(OWN)
    return path


def test_the_vendor_s_list_is_there_with_its_prices_and_source():
    found = {c.name: c for c in configurations()}
    assert len(found) == 12
    assert {n: found[n].usd_hour for n in ("teslaa100-3", "h200-2", "teslaa100-4.nvlink", "h200-8.nvlink")} == {
        "teslaa100-3": 7.37, "h200-2": 9.42, "teslaa100-4.nvlink": 9.5, "h200-8.nvlink": 37.34,
    }  # fmt: skip
    assert all("without a date" in c.said for c in found.values())


def test_every_configuration_is_a_machine_with_its_price():
    for name, there in listed():
        assert there.price_usd_hour is not None and there.count >= 2, name
        assert any(name in a for a in there.assumed)


def test_without_nvlink_devices_reach_each_other_over_pcie():
    found = dict(listed())
    assert found["h200-2"].device.peer_bytes_s == found["h200-2"].device.host_bytes_s
    assert found["h200-2.nvlink"].device.peer_bytes_s == 450e9
    assert found["teslaa100-4"].device.name == "a100-pcie" and found["teslaa100-4.nvlink"].device.name == "a100"


def test_a_machine_gets_the_price_of_as_many_of_its_devices():
    assert priced(machine("h200:2")).price_usd_hour == 9.42
    assert priced(machine("a100:4")).price_usd_hour == 9.5
    assert priced(machine("a100-pcie:4")).price_usd_hour == 9.17
    assert any("h200-2.nvlink" in a and "without a date" in a for a in priced(machine("h200:2")).assumed)


@pytest.mark.parametrize("asked", ["h200", "h200:3", "b200:8", "rtx-4090"])
def test_no_price_is_invented(asked):
    there = machine(asked)
    assert priced(there) == there


def test_a_price_that_was_given_stays(file):
    assert priced(machine("h200:2", price="1.5"), file).price_usd_hour == 1.5


def test_this_very_machine_is_not_rented(monkeypatch):
    from pyrosome.plan import here

    gpu = here.FoundGpu("NVIDIA H200", 143_771 << 20, "9.0")
    found = here.Here((gpu, gpu), "", "x86_64", 8, 2.0, frozenset({"avx2"}), 64 << 30, 10**12)
    monkeypatch.setattr(here, "look", lambda: found)
    assert machine().count == 2 and priced(machine()).price_usd_hour is None


def test_a_user_s_file_is_read_in_the_list_s_place(file):
    (_, two), (_, dear) = listed(file)
    assert (two.price_usd_hour, two.ram_bytes, two.nvme_bytes) == (7.0, 1 << 40, 8 * 10**12)
    assert two.host is not None and two.host.title.startswith("2x AMD EPYC 9654")
    assert dear.count == 2
    found = priced(machine("h200:2"), file)
    assert found.price_usd_hour == 7.0 and any("$7.00 an hour: two, our own quotes" in a for a in found.assumed)
    assert priced(machine("a100:4"), file).price_usd_hour is None


def test_a_device_of_a_user_s_own_can_be_priced(tmp_path, file):
    hardware = tmp_path / "hardware.toml"
    hardware.write_text(
        '[[gpu]]\nname = "mine"\ntitle = "Mine"\nmemory = { gb = 40, mib = 40000, gb_s = 1000 }\n'
        'tflops = { f32 = 10 }\nlinks = { peer = 30, host = 30 }\nsource = "measured by its owner"\n'
    )
    file.write_text('[[configuration]]\nname = "x"\ngpu = "mine:2"\nusd_hour = 1\n')
    assert listed(file, hardware)[0][1].device.title == "Mine"
    assert "from the price list" in configurations(file)[0].said
    with pytest.raises(RequestError, match="configuration 'x' of the price list: no device is called 'mine'"):
        listed(file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("usd_hour = 7\n", "usd_hour = 0\n", "configuration 1.usd_hour is 0"),
        ("usd_hour = 7\n", "usd_hour = -1\n", "configuration 1.usd_hour is -1"),
        ("usd_hour = 7\n", "usd_hour = nan\n", "configuration 1.usd_hour is nan"),
        ("usd_hour = 7\n", "usd_hour = inf\n", "configuration 1.usd_hour is inf"),
        ("usd_hour = 7\n", "usd_hour = true\n", "configuration 1.usd_hour is True"),
        ("usd_hour = 7\n", 'usd_hour = "7"\n', "a number without quotes"),
        ("usd_hour = 7\n", "", "configuration 1 lacks usd_hour"),
        ('name = "two"\n', "", "configuration 1 lacks name"),
        ('gpu = "h200:2"', "gpu = 2", "configuration 1.gpu is 2; a text is expected"),
        ('name = "two"', 'name = " "', "configuration 1.name is ' '"),
        ('name = "two"', 'name = "dear"', "two configurations called 'dear'"),
        ('ram = "1T"', "nvlink = 1", "nvlink is 1; true or false"),
        ('ram = "1T"', "gold = 1", "has 'gold'"),
        ("source", "origin", "has 'origin'"),
        ('source = "our own quotes"', "source = 3", "a source that is no text"),
        ("[[configuration]]", "[configuration", "is not TOML"),
        ("usd_hour = 7\n", f"usd_hour = {'9' * 5000}\n", "is not TOML"),
    ],
)
def test_a_list_of_another_form_is_refused_with_entry_and_field(file, old, new, said):
    file.write_text(OWN.replace(old, new, 1))
    with pytest.raises(RequestError) as caught:
        configurations(file)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "source = 'x'", "configuration = []", "configuration = 3", "configuration = [3]"])
def test_a_list_of_nothing_is_refused(file, text):
    file.write_text(text)
    with pytest.raises(RequestError, match="an entry is"):
        configurations(file)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for name in ("a.toml", "b.toml"):
        with pytest.raises(RequestError, match=r"--prices .* cannot be read"):
            configurations(tmp_path / name)


@pytest.mark.parametrize("gpu", ["h2000:2", "h200:0", "cpu", "epyc-9654"])
def test_a_machine_that_is_not_understood_is_refused_with_its_configuration(file, gpu):
    file.write_text(f'[[configuration]]\nname = "odd"\ngpu = "{gpu}"\nusd_hour = 1\n')
    with pytest.raises(RequestError, match="configuration 'odd' of the price list: "):
        listed(file)
