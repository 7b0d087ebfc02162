"""How far apart results are: tensors wherever they are held, floats by size, anything else by share."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from pyrosome.quant import FORMATS, QuantTensor
from pyrosome.testing.equal import difference, from_definition, same_bits, tensors

ONES = torch.ones(4)
NAN, INF = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize(
    ("found", "wanted", "apart"),
    [
        (ONES, ONES, 0.0),
        (ONES * 1.5, ONES, 0.5),
        (ONES.to(torch.float8_e4m3fn), ONES.to(torch.float8_e4m3fn), 0.0),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]), 0.25),
        ((ONES, ONES * 1.25), (ONES, ONES), 0.25),
        (Pair(ONES, ONES * 3), Pair(ONES, ONES), 2.0),
        ({"x": [ONES]}, {"x": [ONES]}, 0.0),
        (ONES[:3], ONES, math.inf),
        (ONES.double(), ONES, math.inf),
        ((ONES,), (ONES, ONES), math.inf),
        (NAN, NAN, 0.0),
        (INF, INF, 0.0),
        (NAN, INF, math.inf),
        (INF, NAN, math.inf),
        (-INF, INF, math.inf),
        (torch.ones(2), NAN, math.inf),
        (NAN, torch.ones(2), math.inf),
        (torch.empty(0), torch.empty(0), 0.0),
        (None, None, 0.0),
        (3, 4, 0.0),  # only tensors are looked at
    ],
)
def test_differences(found, wanted, apart):
    assert difference(found, wanted) == pytest.approx(apart)


def test_a_difference_from_nothing_is_large():
    assert difference(ONES * 1e-6, torch.zeros(4)) > 1e20


def test_tensors_of_this_package_s_objects_are_found():
    weight = QuantTensor("fp8", *FORMATS["fp8"].quantize(torch.randn(128, 128)))
    assert [t.data_ptr() for t in tensors([{"w": weight}])] == [weight.data.data_ptr(), weight.scale.data_ptr()]


def test_bits_are_bits():
    assert same_bits((NAN, ONES), (NAN.clone(), ONES.clone()))
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    assert not same_bits(ONES, ONES.double()) and not same_bits(ONES, ONES[:2])
    assert same_bits(torch.tensor(1.0), torch.tensor(1.0))


def test_each_is_given_arguments_of_its_own():
    def adding(x, *, to):
        to.add_(x)

    def adding_wrongly(x, *, to):
        to.add_(2 * x)

    to = torch.ones(4)
    assert from_definition(adding, adding, (ONES,), {"to": to}) == 0.0
    assert from_definition(adding_wrongly, adding, (ONES,), {"to": to}) == pytest.approx(0.5)
    assert torch.equal(to, ONES)
