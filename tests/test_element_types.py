"""Element types: declared once on each side, and refused where they are not declared."""

import pytest
import torch
from torch.nn import Parameter

import rmsgd
from rmsgd.element_types import ELEMENT_TYPES

UNKNOWN = [
    dtype
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and str(dtype) == f"torch.{name}"
    if dtype not in ELEMENT_TYPES
]


def test_python_and_the_core_declare_the_same_types_in_the_same_order():
    core = pytest.importorskip("rmsgd._cpu")
    assert core.element_types() == list(ELEMENT_TYPES.values())


@pytest.mark.parametrize("name", [*(str(dtype).removeprefix("torch.") for dtype in UNKNOWN), "", "float3"])
def test_the_core_refuses_a_type_that_is_not_declared_and_names_those_that_are(name):
    core = pytest.importorskip("rmsgd._cpu")
    matrix = torch.ones(2, 2)
    with pytest.raises(ValueError, match=f"float32, float64, float16, bfloat16, got {name}$"):
        core.measure([(matrix.data_ptr(), name, [2], [2], [2], [1])])


@pytest.mark.parametrize("dtype", UNKNOWN, ids=str)
def test_a_parameter_of_a_type_that_is_not_declared_is_refused_by_name(dtype):
    weight = Parameter(torch.empty(4, 3, dtype=dtype))
    with pytest.raises(TypeError, match=f"head.weight has dtype {dtype}; RMSGD knows float32, float64"):
        rmsgd.RMSGD([("head.weight", weight)], lr=0.1)
