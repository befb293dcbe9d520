"""Whatever the compiled core is given, it returns or raises, and writes to no other memory."""

import math
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import rmsgd
from rmsgd.backends.base import MEASURED, STABLE_RANK

_cpu = pytest.importorskip("rmsgd._cpu", reason="the compiled core was not built")

REFUSALS = (TypeError, ValueError, IndexError, OverflowError)
"""The exceptions that bad arguments may raise, besides MemoryError where a size is huge."""

INT64 = 2**63 - 1
PLAIN = (1.0, 0.9, 0.0, 0.0, False, False, True)

many = settings(max_examples=150, suppress_health_check=list(HealthCheck))

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**32, INT64, -INT64 - 1, 2**64 - 1]),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.integers(-3, 3), max_size=3),
    st.just(np.zeros(3)),
    st.just(object()),
)


def mangled(draw, arguments, garbage=anything):
    """The arguments with up to two of them, or of the entries of a list, replaced."""
    arguments = list(arguments)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(arguments) - 1))
        value = arguments[at]
        if isinstance(value, list) and value and draw(st.booleans()):
            value = list(value)
            value[draw(st.integers(0, len(value) - 1))] = draw(garbage)
            arguments[at] = value
        elif isinstance(value, list) and value and draw(st.booleans()):
            arguments[at] = value[1:] if draw(st.booleans()) else [*value, value[0]]
        else:
            arguments[at] = draw(garbage)
    return arguments


def odd_array(draw, array):
    """The array in another dtype, shape, layout or alignment, or read-only."""
    kind = draw(st.sampled_from(["dtype", "shape", "stride", "misaligned", "read-only", "short", "values"]))
    if kind == "dtype":
        return array.astype(draw(st.sampled_from([np.float32, np.int64, np.complex128, object, "S4"])))
    if kind == "shape":
        return array.reshape(draw(st.sampled_from([(1, -1), (-1, 1)])))
    if kind == "stride":
        return np.repeat(array, 2)[::2]
    if kind == "misaligned":
        moved = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype)
        moved[:] = array.ravel()
        return moved
    if kind == "read-only":
        copy = array.copy()
        copy.flags.writeable = False
        return copy
    if kind == "short":
        return array.ravel()[: draw(st.integers(0, max(0, array.size - 1)))].copy()
    changed = array.copy().ravel()
    if changed.size:
        extreme = [-(2**31), -3, -1, 0, 1, 2, 2**31 - 1]
        extreme += [math.nan, math.inf, -0.0, 5e-324, 1e308] if array.dtype.kind == "f" else []
        changed[draw(st.integers(0, changed.size - 1))] = draw(st.sampled_from(extreme))
    return changed


# -- the step ------------------------------------------------------------------------------------

ARENA = 4096


class Arena:
    """Memory with parameters and buffers somewhere in it. The rest of it must stay as it is."""

    def __init__(self):
        self.bytes = np.full(ARENA, 0xA5, np.uint8)
        self.start = self.bytes.ctypes.data

    def untouched_outside(self, extents):
        changed = self.bytes != 0xA5
        for begin, end in extents:
            changed[begin - self.start : end - self.start] = False
        return not changed.any()


SIZE_OF = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@st.composite
def plans(draw):
    """Arguments of a StepPlan in an arena: any offsets, some of them misaligned or overlapping."""
    arena = Arena()
    count = draw(st.integers(0, 4))
    dtypes = draw(st.lists(st.sampled_from(list(SIZE_OF)), min_size=count, max_size=count))
    numels = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    step = draw(st.sampled_from([1, 8, 8, 8]))
    offsets = st.integers(0, (ARENA - 400) // step).map(lambda k: arena.start + k * step)
    pointers = st.lists(offsets, min_size=count, max_size=count)
    buffers = draw(pointers)
    if buffers and draw(st.booleans()):
        buffers[0] = 0
    return arena, [
        draw(pointers),
        buffers,
        dtypes,
        numels,
        [0] * count,
        list(range(count)),
        np.full(count, 0.1),
        np.ones(count, np.bool_),
    ]


def extents(arguments):
    parameters, buffers, dtypes, numels = arguments[:4]
    found = []
    for p, b, dtype, n in zip(parameters, buffers, dtypes, numels, strict=True):
        found.append((p, p + n * SIZE_OF[dtype]))
        found.append((b, b + n * (8 if dtype == "float64" else 4)))
    return sorted((begin, end) for begin, end in found if begin and end > begin)


def overlap(spans):
    spans = sorted(spans)
    return any(b[0] < a[1] for a, b in pairwise(spans))


@many
@given(plans(), st.data())
def test_a_step_writes_its_parameters_and_buffers_and_nothing_else(made, data):
    arena, arguments = made
    gradient = np.ones(40 * 8, np.uint8)
    gradients = [gradient.ctypes.data + data.draw(st.sampled_from([0, 0, 0, 1, 8])) for _ in arguments[0]]
    groups = [tuple(mangled(data.draw, PLAIN, st.sampled_from([0.0, 1.0, True, 0.9, math.nan, "x"])))]
    scale = data.draw(st.sampled_from([1.0, 1.0, 0.0, -1.0, math.nan, math.inf, 65536.0]))
    try:
        plan = _cpu.StepPlan(*arguments)
    except REFUSALS:
        return
    assert not overlap(extents(arguments))
    threads = data.draw(st.sampled_from([1, 2, 5, 0, -1, 2**31, 2**62]))
    named = st.sampled_from(["float32", "float32", "float16", "float64", "int8"])
    dtypes = data.draw(st.one_of(st.none(), st.lists(named, max_size=len(gradients) + 1)))
    try:
        plan.step(gradients, groups, scale, threads, dtypes)
    except REFUSALS:
        assert arena.untouched_outside([])
    assert arena.untouched_outside(extents(arguments))


@many
@given(plans(), st.data())
def test_garbage_makes_no_plan(made, data):
    arena, arguments = made
    # There are no invalid addresses, since the caller must know that there is memory at an address.
    garbage = st.one_of(
        anything.filter(lambda x: not isinstance(x, int) or not 4096 < x < 2**62),
        st.builds(odd_array, st.just(data.draw), st.just(arguments[6])),
        st.builds(odd_array, st.just(data.draw), st.just(arguments[7])),
    )
    try:
        plan = _cpu.StepPlan(*mangled(data.draw, arguments, garbage))
        plan.step([0] * len(arguments[0]), data.draw(st.lists(anything, max_size=2)))
    except REFUSALS:
        pass
    assert arena.untouched_outside([])


def bits(tensor):
    return tensor.detach().clone().view(torch.uint8)


ODD_GRADIENTS = {
    "none": lambda p, others: None,
    "plain": lambda p, others: torch.ones_like(p),
    "sparse": lambda p, others: torch.ones_like(p).to_sparse(),
    "transposed": lambda p, others: torch.ones(p.shape[::-1], dtype=p.dtype).t(),
    "expanded": lambda p, others: torch.ones((), dtype=p.dtype).expand(p.shape),
    "with gaps": lambda p, others: torch.ones(2 * p.shape[0], p.shape[1], dtype=p.dtype)[::2],
    "the parameter": lambda p, others: p.detach(),
    "another parameter": lambda p, others: others[0].detach(),
    "half of another": lambda p, others: others[1].detach()[: p.shape[0]],
    "misaligned": lambda p, others: misaligned(torch.ones_like(p)),
    "a subclass": lambda p, others: nn.Parameter(torch.ones_like(p)),
}


def misaligned(values):
    memory = torch.zeros(values.nbytes + 1, dtype=torch.uint8).numpy()
    moved = torch.frombuffer(memory, dtype=values.dtype, offset=1, count=values.numel()).view(values.shape)
    return moved.copy_(values)


@pytest.mark.parametrize("kind", ODD_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_gradient_gives_the_step_that_plain_torch_takes(kind, dtype):
    shapes = [(3, 5), (3, 5), (6, 5)]
    mine, theirs = (
        [nn.Parameter(torch.full(s, 0.5 + i, dtype=dtype)) for i, s in enumerate(shapes)] for _ in range(2)
    )
    for parameters in (mine, theirs):
        for p in parameters:
            p.grad = torch.ones_like(p)
        parameters[0].grad = ODD_GRADIENTS[kind](parameters[0], parameters[1:])
    optimizer = rmsgd.RMSGD(mine, lr=0.1, momentum=0.5, rule="release")
    if kind == "sparse":
        before = [bits(p) for p in mine]
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        assert all(torch.equal(bits(p), b) for p, b in zip(mine, before, strict=True))
        return
    optimizer.step()
    torch.optim.SGD(theirs, lr=0.1, momentum=0.5, foreach=False).step()
    for ours, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_misaligned_parameter_is_stepped_and_measured():
    straight = nn.Parameter(torch.randn(9, 12))
    crooked = nn.Parameter(misaligned(straight.detach()))
    for p in (straight, crooked):
        optimizer = rmsgd.RMSGD([p], lr=0.1)
        for _ in range(2):
            p.grad = torch.ones(9, 12)
            optimizer.step()
            optimizer.epoch_step()
    assert torch.equal(straight, crooked)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda whole: whole[:6], lambda whole: whole[5:]),
        (lambda whole: whole[5:], lambda whole: whole[:6]),
        (lambda whole: whole[:, :3], lambda whole: whole[:, 2:]),
        (lambda whole: whole, lambda whole: whole[9, 3:]),
        (lambda whole: whole[:, 1:], lambda whole: whole.view(torch.float64)[:, 1:]),
        (lambda whole: whole[:, 3:], lambda whole: whole.view(torch.float64)[:, 1:]),
    ],
    ids=["rows", "rows before", "columns", "the last element", "types", "halves of elements"],
)
def test_parameters_that_share_memory_are_refused_by_name(a, b):
    whole = torch.zeros(10, 4)
    named = [("a.weight", nn.Parameter(a(whole))), ("b.weight", nn.Parameter(b(whole)))]
    optimizer = rmsgd.RMSGD(named)
    named[0][1].grad = torch.ones_like(named[0][1])
    with pytest.raises(RuntimeError, match=r"a\.weight and b\.weight share memory"):
        optimizer.step()
    assert not whole.any()


def test_a_parameter_in_the_gaps_of_another_hides_no_third_that_shares_its_memory():
    whole = torch.zeros(10, 4)
    parts = {"a": whole[:, :2], "gap": whole[0, 2:], "b": whole[9, 1:]}
    optimizer = rmsgd.RMSGD([(name, nn.Parameter(part)) for name, part in parts.items()])
    with pytest.raises(RuntimeError, match="a and b share memory"):
        optimizer.step()


@pytest.mark.parametrize(
    "split",
    [
        lambda whole: (whole[:6], whole[6:]),
        lambda whole: (whole[:, ::2], whole[:, 1::2]),
        lambda whole: (whole[:, :3], whole[:, 3:]),
    ],
    ids=["rows", "every second column", "columns"],
)
def test_neighbours_in_one_allocation_do_not_share_memory(split):
    whole = torch.zeros(10, 4)
    parts = [nn.Parameter(part) for part in split(whole)]
    optimizer = rmsgd.RMSGD(parts, lr=1.0, momentum=0.0)
    for p in parts:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (whole == -1).all()


@many
@given(st.data())
def test_step_tensors_refuses_what_it_was_not_planned_for(data):
    parameters = [nn.Parameter(torch.zeros(6)) for _ in range(3)]
    buffers = [torch.zeros(6) for _ in parameters]
    plan = _cpu.StepPlan(
        [p.data_ptr() for p in parameters],
        [b.data_ptr() for b in buffers],
        ["float32"] * 3,
        [6] * 3,
        [0] * 3,
        [0] * 3,
        np.ones(1),
        np.ones(3, np.bool_),
    )
    for p in parameters:
        p.grad = torch.ones(6)
    others = st.sampled_from([torch.zeros(6), nn.Parameter(torch.zeros(7)), torch.zeros(6, device="meta")])
    odd_type = st.sampled_from([torch.Tensor, nn.Parameter, int, np.ndarray])
    arguments = [data.draw(odd_type), list(parameters), [PLAIN], 1.0, 1]
    arguments = mangled(data.draw, arguments, st.one_of(anything, others))
    try:
        without = plan.step_tensors(*arguments)
    except REFUSALS:
        without = None
    if without is None:
        assert not any(p.any() for p in parameters)


EXCHANGES = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10 has no exchange table"
)


@EXCHANGES
def test_a_list_that_shrinks_while_it_is_read_is_no_harm():
    class Treacherous(torch.Tensor):
        @property
        def grad(self):
            listed.clear()

    listed = [torch.zeros(4).as_subclass(Treacherous) for _ in range(3)]
    pointers = [t.data_ptr() for t in listed]
    plan = _cpu.StepPlan(
        pointers, [0] * 3, ["float32"] * 3, [4] * 3, [0] * 3, [0] * 3, np.ones(1), np.ones(3, np.bool_)
    )
    with pytest.raises(IndexError):
        plan.step_tensors(torch.Tensor, listed, [PLAIN])


def test_a_step_taken_by_two_threads_at_once_is_refused_or_taken_twice():
    parameter = nn.Parameter(torch.zeros(3_000_000))
    optimizer = rmsgd.RMSGD([parameter], lr=1.0, momentum=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    refused = []

    def step():
        try:
            optimizer.step()
        except RuntimeError as error:
            refused.append(str(error))

    for _ in range(5):
        pair = [threading.Thread(target=step) for _ in range(2)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
    assert all("another thread" in message for message in refused)
    assert torch.equal(parameter, torch.full_like(parameter, float(len(refused) - 11)))


@EXCHANGES
@many
@given(anything, st.one_of(anything, st.lists(st.one_of(anything, st.just(torch.zeros(2))), max_size=4)))
def test_layouts_refuses_what_is_no_tensor(kind, tensors):
    for tensor_type in (kind, torch.Tensor, int):
        if tensor_type is torch.Tensor and isinstance(tensors, list) and all(map(torch.is_tensor, tensors)):
            continue
        with pytest.raises(REFUSALS):
            _cpu.Layouts(tensor_type, tensors)
    layouts = _cpu.Layouts(torch.Tensor, [torch.zeros(2)])
    if isinstance(tensors, list):
        assert not layouts.hold(tensors)
    else:
        with pytest.raises(TypeError):
            layouts.hold(tensors)


@EXCHANGES
def test_layouts_that_a_tensor_leaves_hold_no_more():
    tensors = [torch.zeros(3, 4), torch.zeros(())]
    layouts = _cpu.Layouts(torch.Tensor, tensors)
    assert layouts.hold(tensors)
    assert not layouts.hold(tensors[:1])
    assert not layouts.hold([*tensors, tensors[0]])
    kept = nn.Parameter(torch.zeros(3, 4))
    layouts = _cpu.Layouts(torch.Tensor, [kept])
    kept.data = kept.data.t()
    assert not layouts.hold([kept])


# -- spectra -------------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    """A weight and how a matrix lies in it, as ``measure`` takes it, possibly mangled."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(6, 9))
    weight = torch.randn(rows, columns)
    described = [weight.data_ptr(), "float32", [rows], [columns], [columns], [1]]
    address = st.sampled_from([0, 1, 2**64 - 4, 2**63 - 4, 2**63, -4, weight.data_ptr() + 2])
    odd = st.one_of(
        anything.filter(lambda x: not isinstance(x, int)),
        st.lists(st.sampled_from([0, 1, -1, 2**20, 2**31, 2**40, 2**62, INT64]), max_size=6),
    )
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, 5))
        described[at] = draw(address if at == 0 else odd)
    return weight, described


def spans_memory_of(weight, described):
    """Whether every element that the description reaches is one of the weight's (else it may not be read)."""
    try:
        data, _, *sides = described
        sizes, strides = (list(sides[i]) + list(sides[i + 2]) for i in (0, 1))
        reach = [(n - 1) * s for n, s in zip(sizes, strides, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        return data != weight.data_ptr() or min(sizes) < 1 or (low >= 0 and high < weight.numel())
    except (TypeError, ValueError):
        return True


@many
@given(matrices(), st.one_of(st.just(1), anything))
def test_measure_refuses_a_description_that_makes_no_sense(made, threads):
    weight, described = made
    impossible = any(
        isinstance(side, list) and any(isinstance(x, int) and abs(x) >= 2**62 for x in side)
        for side in described[2:]
    )
    if not (spans_memory_of(weight, described) or impossible):
        return
    before = bits(weight)
    try:
        table = _cpu.measure([tuple(described)], threads)
    except (*REFUSALS, MemoryError):
        pass
    else:
        assert table.shape == (1, 7)
    assert torch.equal(bits(weight), before)


def test_measure_refuses_neighbouring_dimensions_whose_product_wraps_around():
    weight = torch.randn(2, 4)
    with pytest.raises(ValueError, match="a side is longer than"):  # 2^64 + 4 elements, not 4
        _cpu.measure([(weight.data_ptr(), "float32", [2], [4], [2**62 + 1, 4], [4, 1])])


@many
@given(
    st.one_of(
        st.lists(st.floats(), max_size=20).map(np.array),
        st.builds(np.array, st.lists(st.floats(0, 1e300), min_size=1, max_size=20)),
        anything,
    ),
    st.one_of(st.integers(1, 30), anything),
)
@example(np.array([math.nan, 1.0]), 4)
@example(np.array([math.inf, 1.0]), 4)
@example(np.array([1.0, math.nan]), 4)
@example(np.array([0.0, 1.0]), 4)
@example(np.array([-1.0, -2.0]), 4)
def test_measure_spectrum_takes_descending_finite_values_and_nothing_else(gamma, M):
    valid = (
        isinstance(gamma, np.ndarray)
        and gamma.dtype == np.float64
        and len(gamma) > 0
        and bool(np.isfinite(gamma).all() and (gamma >= 0).all() and (np.diff(gamma) <= 0).all())
        and isinstance(M, int)
        and len(gamma) <= M <= INT64
    )
    if not valid:
        with pytest.raises(REFUSALS):
            _cpu.measure_spectrum(gamma, M)
        return
    rank, variance, stable_rank, condition, *_ = _cpu.measure_spectrum(gamma, M)
    assert 0 <= rank <= len(gamma)
    assert variance >= 0
    assert 0 <= stable_rank <= 1
    assert 0 <= condition <= 1


# -- learning rates ------------------------------------------------------------------------------


def rate_tables():
    layers, rows, followers = 3, 4, 2
    return [
        np.arange(layers, dtype=np.int32),
        np.zeros(layers, np.int32),
        np.array([0, 1, 3, 4], np.int32),
        np.ones(rows),
        np.zeros(layers),
        np.zeros(layers, np.int32),
        np.full(layers, 0.1),
        np.full(layers + followers, 0.1),
        np.array([3, 4], np.int32),
        np.array([0, -1], np.int32),
        np.zeros(followers, np.int32),
        [(0.1, 0.9, 1.0, 1.0, 0.0, 0.0, 0.0, math.inf, STABLE_RANK, False, 0, True)],
        np.tile([2, 0.1, 0.5, 0.5, 1.5, MEASURED, 0], (rows, 1)),
    ]


@many
@given(st.data())
def test_update_rates_refuses_tables_that_do_not_fit(data):
    arguments = rate_tables()
    groups = next(at for at, argument in enumerate(arguments) if isinstance(argument, list))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(arguments) - 1))
        if at != groups and data.draw(st.booleans()):
            arguments[at] = odd_array(data.draw, rate_tables()[at])
        elif at == groups and isinstance(arguments[at], list):
            arguments[at] = [tuple(mangled(data.draw, arguments[at][0]))] if arguments[at] else []
        elif data.draw(st.booleans()):
            arguments[at] = arguments[data.draw(st.integers(0, len(arguments) - 1))]  # the same memory twice
        else:
            arguments[at] = data.draw(anything)
    try:
        _cpu.update_rates(*arguments)
    except REFUSALS:
        return
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    assert len(arrays) == len(arguments) - 1
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_the_tables_of_a_sound_call_are_accepted():
    arguments = rate_tables()
    _cpu.update_rates(*arguments)
    assert np.all(arguments[6] != 0.1)
    assert np.all(arguments[7] != 0.1)


# -- CUDA ----------------------------------------------------------------------------------------


@many
@given(st.data())
def test_the_cuda_module_refuses_garbage(data):
    cuda = pytest.importorskip("rmsgd._cuda", reason="built where nvcc is", exc_type=ImportError)
    call = data.draw(st.sampled_from([cuda.shared_memory, cuda.argument_bytes, cuda.resident_blocks]))
    with pytest.raises((*REFUSALS, KeyError, RuntimeError)):
        call(*data.draw(st.lists(anything.filter(lambda x: x != 0), max_size=4)))
    arguments = ["step", 0, 1, 32, 0, 0, np.zeros(3, np.uint8), False]
    with pytest.raises((*REFUSALS, KeyError, RuntimeError, BufferError)):
        cuda.launch(*mangled(data.draw, arguments))
