"""a[index] and a[index] = v against NumPy."""
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazulite.engine import array as mx

SHAPE = (4, 3, 5)


@st.composite
def indices(draw):
    """Tuples of integers, slices of any step, None, … and integer arrays that broadcast together."""
    used, items, ellipsis = 0, [], False
    width = draw(st.sampled_from([(), (2,), (3, 2)]))
    while used < len(SHAPE):
        kind = draw(st.sampled_from(["stop", "int", "slice", "slice", "array", "none", "ellipsis"]))
        size = SHAPE[used]
        if kind == "stop":
            break
        if kind == "none":
            items.append(None)
        elif kind == "ellipsis":
            if not ellipsis:
                items.append(Ellipsis)
            ellipsis = True
            break
        else:
            used += 1
            bound = st.none() | st.integers(-size - 2, size + 2)
            if kind == "int":
                items.append(draw(st.integers(-size, size - 1)))
            elif kind == "slice":
                items.append(slice(draw(bound), draw(bound), draw(st.none() | st.sampled_from([-2, -1, 1, 2, 3]))))
            else:
                shape = draw(st.sampled_from([width, width[1:], ()]))
                count = int(np.prod(shape))
                flat = draw(st.lists(st.integers(-size, size - 1), min_size=count, max_size=count))
                items.append(np.array(flat, np.int32).reshape(shape))
    return tuple(items)


def ours(index):
    return tuple(mx.array(i) if isinstance(i, np.ndarray) else i for i in index)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(indices(), st.booleans())
def test_get(runtime, index, lazy):
    x = np.arange(60, dtype=np.float32).reshape(SHAPE)
    a = mx.array(x) + 0 if lazy else mx.array(x)
    want = x[index]
    got = a[ours(index)]
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.asarray(got), want)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(indices(), st.booleans(), st.booleans())
def test_set(runtime, index, lazy, scalar):
    x = np.arange(60, dtype=np.float32).reshape(SHAPE)
    a = mx.array(x) + 0 if lazy else mx.array(x)
    before, shape = a[0], x[index].shape
    value = 7.0 if scalar else -np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    kept = np.array(x[0])
    a[ours(index)] = value if scalar else mx.array(value)
    flat = np.arange(60).reshape(SHAPE)[index].ravel()
    if len(set(flat.tolist())) < len(flat) and not scalar:
        return                          # which of two writes wins is not defined
    x[index] = value
    np.testing.assert_array_equal(np.asarray(a), x)
    np.testing.assert_array_equal(np.asarray(before), kept)


def test_chained_and_augmented_updates(runtime):
    x, a = np.arange(12.0).reshape(3, 4), mx.array(np.arange(12.0).reshape(3, 4))
    x[1:] += 2
    a[1:] += 2
    x[:, ::-2] = x[:, :2]
    a[:, ::-2] = a[:, :2]
    x[0] *= x[1]
    a[0] *= a[1]
    np.testing.assert_array_equal(np.asarray(a), x)


def test_refused_indices():
    a, t = mx.zeros(SHAPE), mx.placeholder((mx.Dim("T", 4), 3), mx.float32)
    with pytest.raises(ValueError, match="boolean mask"):
        a[a > 1]
    with pytest.raises(IndexError, match="index 4 is out of range for axis 0 of size 4"):
        a[4]
    with pytest.raises(IndexError, match="4 indices for an array of shape"):
        a[0, 0, 0, 0]
    with pytest.raises(IndexError, match="axis 0: index 'x' is no integer"):
        a["x"]
    with pytest.raises(ValueError, match="axis 'T' is symbolic and can only be taken whole"):
        t[1:]
    with pytest.raises(IndexError, match="axis 0 of size T"):
        t[0]
    with pytest.raises(RuntimeError, match="out of range"):
        mx.eval(mx.take(mx.zeros(3), mx.array([7])))
