"""Messages between processes come back as they were, and hold nothing that could run."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradientspace.messages import pack, unpack

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain)
def test_plain_values_come_back(value):
    assert unpack(pack(value)) == value


def test_tensors_and_arrays_come_back_with_their_types():
    rows = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    value = {"rows": rows.T, "none": torch.empty(0), "labels": np.array([3, -1]), "half": np.ones((2, 2), np.float16)}
    found = unpack(pack([value, (1, "two")]))
    assert found[1] == [1, "two"]
    assert torch.equal(found[0]["rows"], rows.T)
    assert found[0]["rows"].dtype == torch.bfloat16
    assert found[0]["none"].shape == (0,)
    assert found[0]["labels"].tolist() == [3, -1]
    assert found[0]["labels"].dtype == np.int64
    assert isinstance(found[0]["half"], np.ndarray)
    assert found[0]["half"].dtype == np.float16


def test_the_same_tensor_may_be_sent_twice():
    row = torch.ones(3)
    first, second = unpack(pack([row, row]))
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [{1: "a"}, object(), {"a": {2}}], ids=["key", "object", "set"])
def test_anything_else_is_refused(value):
    with pytest.raises(TypeError, match="a message cannot hold"):
        pack(value)
