"""A quantised weight is measured as the numbers that it stands for, or is skipped: never as its raw codes.

The layouts are those that the packages write, made here by plain loops over single codes.
"""

import json

import pytest
import torch
from safetensors import numpy as arrays
from safetensors.torch import save_file

import rmsgd
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.weights.bits import unpack

O, I = 12, 64  # noqa: E741 - outputs and inputs


def signed(bits, *shape):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)


def unsigned(bits, *shape):
    return torch.randint(0, 2**bits, shape)


def positive(*shape):
    return torch.rand(*shape) + 0.5


def stream(codes, bits):
    """Rows of codes as 32-bit words, code after code, the lowest bit first."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append(
            [
                int.from_bytes(number.to_bytes(4 * words, "little")[4 * k : 4 * k + 4], "little")
                for k in range(words)
            ]
        )
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def groups(scale, size):
    """A scale for every column."""
    return scale.double().repeat_interleave(size, 1)


def saved(folder, state, metadata=None, **settings):
    """The state dict as a safetensors file, with its settings beside it."""
    path = folder / "model.safetensors"
    state = {name: value.contiguous() for name, value in state.items()}
    if any(value.dtype == torch.uint32 for value in state.values()):  # older ones only read it
        arrays.save_file({name: value.numpy() for name, value in state.items()}, path, metadata)
    else:
        save_file(state, path, metadata)
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return path


def assert_stands_for(source, expected, name="fc.weight"):
    """One layer is measured, as these numbers; all that belongs to it is named as its part."""
    probing = Probing(source)
    probing.run()
    measured = [layer for layer in probing.layers if layer.skipped is None]
    assert [(layer.name, layer.shape) for layer in measured] == [(name, tuple(expected.shape))]
    assert all(layer.skipped.endswith(f" of {name}") for layer in probing.layers if layer.skipped)
    weight = probing.weight(name).double()
    assert torch.allclose(weight, expected.double(), rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


# -- eight bits ----------------------------------------------------------------------------------

CODES = signed(8, O, I).to(torch.int8)
FLOATS = torch.randn(O, I).to(torch.float8_e4m3fn)
ROWS, TENSOR, BLOCKS = positive(O, 1), positive(1), positive(3, 2)  # blocks of 4 x 32
OVER_BLOCKS = BLOCKS.repeat_interleave(4, 0).repeat_interleave(32, 1)
ZEROS = signed(8, O, 1).to(torch.int8)

EIGHT_BITS = {
    "torchao": (
        {"fc._weight_qdata": CODES, "fc._weight_scale": ROWS, "fc._weight_zero_point": ZEROS},
        (CODES.double() - ZEROS) * ROWS,
    ),
    "torchao, float8": ({"fc._weight_qdata": FLOATS, "fc._weight_scale": ROWS}, FLOATS.double() * ROWS),
    "torchao, blocks": (
        {"fc._weight_qdata": CODES, "fc._weight_scale": BLOCKS},
        CODES * OVER_BLOCKS.double(),
    ),
    "quanto": (
        {"fc.weight._data": CODES, "fc.weight._scale": ROWS, "fc.input_scale": torch.ones(())},
        CODES * ROWS.double(),
    ),
    "quanto, float8": ({"fc.weight._data": FLOATS, "fc.weight._scale": ROWS}, FLOATS.double() * ROWS),
    "compressed-tensors": ({"fc.weight": CODES, "fc.weight_scale": ROWS}, CODES * ROWS.double()),
    "compressed-tensors, tensor": ({"fc.weight": CODES, "fc.weight_scale": TENSOR}, CODES * TENSOR.double()),
    "compressed-tensors, zero points": (
        {"fc.weight": CODES, "fc.weight_scale": ROWS, "fc.weight_zero_point": ZEROS},
        (CODES.double() - ZEROS) * ROWS,
    ),
    "compressed-tensors, float8": (
        {"fc.weight": FLOATS, "fc.weight_scale": ROWS.bfloat16()},
        FLOATS.double() * ROWS.bfloat16(),
    ),
    "DeepSeek": ({"fc.weight": FLOATS, "fc.weight_scale_inv": BLOCKS}, FLOATS.double() * OVER_BLOCKS),
    "ComfyUI": (
        {"fc.weight": FLOATS, "fc.scale_weight": TENSOR[0], "scaled_fp8": torch.zeros(0)},
        FLOATS.double() * TENSOR,
    ),
    "gpt-fast": ({"fc.weight": CODES, "fc.scales": ROWS[:, 0]}, CODES * ROWS.double()),
    "float8 with scales": ({"fc.weight": FLOATS, "fc.scales": ROWS}, FLOATS.double() * ROWS),
    "LLM.int8()": (
        {"fc.weight": CODES, "fc.SCB": ROWS[:, 0], "fc.weight_format": torch.tensor(0)},
        CODES * ROWS.double() / 127,
    ),
}


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("form", ["mapping", "torch", "safetensors"])
def test_eight_bits_are_multiplied_by_their_scales(tmp_path, kind, form):
    state, expected = EIGHT_BITS[kind]
    source = state
    if form == "torch":
        source = tmp_path / "m.pt"
        torch.save(state, source)
    elif form == "safetensors":
        source = saved(tmp_path, state)
    assert_stands_for(source, expected)


def test_scales_in_another_shard_are_found(tmp_path):
    save_file({"fc.weight": CODES}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"fc.weight_scale": ROWS}, tmp_path / "model-00002-of-00002.safetensors")
    assert_stands_for(tmp_path, CODES * ROWS.double())


class Int8Tensor(torch.Tensor):
    """As torchao's: a wrapper whose numbers are in attributes, and which torch.save takes as such."""

    @staticmethod
    def __new__(cls, qdata, scale):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)

    def __init__(self, qdata, scale):
        self.qdata, self.scale = qdata, scale

    def dequantize(self):
        return self.qdata.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].qdata, arguments[0].scale)
        raise NotImplementedError(function)


def test_a_tensor_class_with_codes_is_measured_from_memory_and_from_a_torch_file(tmp_path):
    state = {"fc.weight": Int8Tensor(CODES, ROWS)}
    assert_stands_for(state, CODES * ROWS.double())
    torch.save(state, tmp_path / "m.pt")
    assert_stands_for(tmp_path / "m.pt", CODES * ROWS.double())


# -- less than eight bits ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_out_of_a_stream_of_bits(bits):
    codes = unsigned(bits, 3, 50)
    assert torch.equal(unpack(stream(codes, bits), bits, 50), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("experts", [False, True])
def test_mlx(tmp_path, bits, experts):
    codes, scales, biases = unsigned(bits, O, I), positive(O, 2), torch.randn(O, 2)
    state = {"fc.weight": stream(codes, bits).view(torch.uint32), "fc.scales": scales, "fc.biases": biases}
    expected = codes * groups(scales, 32) + groups(biases, 32)
    if experts:
        state, expected = {k: v.reshape(3, 4, -1) for k, v in state.items()}, expected.reshape(3, 4, I)
    config = {"quantization": {"group_size": 64, "bits": 16, "fc": {"bits": bits, "group_size": 32}}}
    assert_stands_for(saved(tmp_path, state, {"format": "mlx"}, config=config), expected)


def test_mlx_without_its_config_is_skipped_and_its_scales_are_no_layers(tmp_path):
    state = {"fc.weight": stream(unsigned(4, O, I), 4).view(torch.uint32), "fc.scales": positive(O, 2)}
    report = rmsgd.probe(saved(tmp_path, {**state, "fc.biases": positive(O, 2)}, {"format": "mlx"}))
    assert report.measured == ()
    assert any("no config.json" in layer.skipped for layer in report.layers)


def test_mlx_keeps_the_channels_of_a_convolution_last(tmp_path):
    kernel = torch.randn(5, 3, 3, 4)
    assert_stands_for(
        saved(tmp_path, {"c.weight": kernel}, {"format": "mlx"}), kernel.permute(0, 3, 1, 2), "c.weight"
    )


def gptq(bits, version, order=None, outputs=32):
    codes, zeros = unsigned(bits, I, outputs), unsigned(bits, 2, outputs).clamp(1)
    scales = positive(2, outputs).half()
    group = torch.arange(I) // 32 if order is None else order
    state = {
        "fc.qweight": stream(codes.t(), bits).t(),
        "fc.qzeros": stream(zeros - int(version == 1), bits),
        "fc.scales": scales,
    }
    if order is not None:
        state["fc.g_idx"] = order.int()
    return state, ((codes - zeros[group]) * scales[group].double()).t()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq(tmp_path, bits, version, ordered):
    state, expected = gptq(bits, version, torch.randint(0, 2, (I,)) if ordered else None)
    said = {"bits": bits, "checkpoint_format": "gptq_v2"} if version == 2 else {"bits": bits}
    assert_stands_for(saved(tmp_path, state, config={"quantization_config": said}), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_without_settings_is_told_by_zero_points_in_the_middle(tmp_path, version):
    state, _ = gptq(4, version)
    state["fc.qzeros"] = stream(torch.full((2, 32), 8 - int(version == 1)), 4)
    codes = unpack(state["fc.qweight"].t().contiguous(), 4, I)
    assert_stands_for(saved(tmp_path, state), (codes.double() - 8) * groups(state["fc.scales"].t(), 32))


def test_gptq_whose_version_does_not_show_is_skipped(tmp_path):
    report = rmsgd.probe(saved(tmp_path, gptq(4, 1)[0]))
    assert report.measured == ()
    assert any("no quantize_config.json" in layer.skipped for layer in report.layers)


def test_awq():
    codes, zeros, scales = unsigned(4, I, 16), unsigned(4, 2, 16), positive(2, 16).half()

    def pack(numbers):
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return stream(numbers.reshape(len(numbers), -1, 8)[..., order].flatten(1), 4)

    group = torch.arange(I) // 32
    expected = ((codes - zeros[group]) * scales[group].double()).t()
    state = {"fc.qweight": pack(codes), "fc.qzeros": pack(zeros), "fc.scales": scales}
    assert_stands_for(state, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_compressed_tensors(bits, zeros):
    codes, scales, points = signed(bits, O, I), positive(O, 2), signed(bits, O, 2)
    state = {
        "fc.weight_packed": stream(codes + 2 ** (bits - 1), bits),
        "fc.weight_scale": scales,
        "fc.weight_shape": torch.tensor([O, I]),
    }
    if zeros:
        state["fc.weight_zero_point"] = stream(points.t() + 2 ** (bits - 1), bits).t()
    expected = (codes - groups(points, 32) * zeros) * groups(scales, 32)
    assert_stands_for(state, expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes(tmp_path, kind, nested):
    codes, table = unsigned(4, O, I), torch.randn(16)
    said = {"quant_type": kind, "blocksize": 32, "dtype": "float32", "shape": [O, I]}
    largest = positive(O * I // 32)
    flat = codes.flatten()
    state = {
        "fc.weight": ((flat[0::2] << 4) | flat[1::2]).to(torch.uint8)[:, None],
        "fc.weight.absmax": largest,
        "fc.weight.quant_map": table,
    }
    if nested:
        inner, outer, values = unsigned(8, len(largest)), positive(3), torch.randn(256)
        said |= {"nested_blocksize": 10, "nested_dtype": "float32", "nested_offset": 0.25}
        state["fc.weight.absmax"] = inner.to(torch.uint8)
        state |= {"fc.weight.nested_absmax": outer, "fc.weight.nested_quant_map": values}
        largest = values[inner] * outer.repeat_interleave(10)[: len(inner)] + 0.25
    text = json.dumps(said).encode()
    state[f"fc.weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    expected = table[codes].double() * largest.double().repeat_interleave(32).reshape(O, I)
    assert_stands_for(saved(tmp_path, state), expected)


# -- what cannot be unpacked ---------------------------------------------------------------------

WORDS = torch.randint(0, 2**31, (8, 16), dtype=torch.int32)

BYTES = CODES.view(torch.uint8)

NOT_UNPACKED = {
    "quanto, four bits": {"fc.weight._data._data": BYTES, "fc.weight._scale": ROWS, "fc.weight._shift": ROWS},
    "torchao, four bits": {
        "fc._weight_qdata": WORDS,
        "fc._weight_scale_and_zero": torch.randn(8, 16, 2),
        "fc._weight_scale": ROWS,
    },
    "NVFP4": {"fc.weight": BYTES, "fc.weight_scale": FLOATS[:, :4], "fc.weight_scale_2": torch.ones(1)},
    "NVFP4, compressed": {
        "fc.weight_packed": BYTES,
        "fc.weight_scale": FLOATS[:, :4],
        "fc.weight_global_scale": TENSOR,
    },
    "MXFP4": {"fc.weight_blocks": BYTES, "fc.weight_scales": BYTES[:, :4]},
    "HQQ": {"fc.W_q": BYTES, "fc.scale": ROWS, "fc.zero": ROWS},
    "AQLM": {"fc.codes": CODES, "fc.codebooks": torch.randn(1, 256, 1, 8), "fc.scales": positive(O, 1, 1, 1)},
    "EXL2": {"fc.q_weight": WORDS, "fc.q_scale": WORDS[:2], "fc.q_scale_max": torch.randn(2).half()},
    "integers and no scale": {"fc.weight": CODES},
    "GPTQ of odd shapes": {"fc.qweight": WORDS, "fc.qzeros": WORDS[:3, :1], "fc.scales": torch.randn(3, 16)},
    "AWQ of odd shapes": {
        "fc.qweight": WORDS[:7],
        "fc.qzeros": WORDS[:2],
        "fc.scales": torch.randn(2, 128),
    },
    "packed without a shape": {"fc.weight_packed": WORDS, "fc.weight_scale": torch.randn(8, 2)},
    "packed to another shape": {
        "fc.weight_packed": WORDS,
        "fc.weight_scale": torch.randn(8, 3),
        "fc.weight_shape": torch.tensor([8, 128]),
    },
    "scales that fit no rows": {"fc.weight": CODES, "fc.weight_scale": torch.randn(7, 5)},
    "scales of two kinds": {"fc.weight": CODES, "fc.weight_scale": ROWS, "fc.scale_weight": TENSOR},
}


@pytest.mark.parametrize("kind", NOT_UNPACKED)
def test_what_cannot_be_unpacked_is_a_reason_and_its_scales_are_no_layers(kind):
    report = rmsgd.probe(NOT_UNPACKED[kind] | {"sound": torch.randn(5, 6)})
    assert [layer.name for layer in report.measured] == ["sound"]
    assert report.errors == ()
    codes = next(layer for layer in report.layers if layer.skipped)
    assert codes.shape == next(iter(NOT_UNPACKED[kind].values())).shape


HOSTILE = [
    {"shape": [2**40, 2**40], "blocksize": 64},
    {"shape": [], "blocksize": 64},
    {"shape": [O, I], "blocksize": 0},
    {"shape": [O, I], "blocksize": 2**62},
    {"shape": "everything", "blocksize": 64},
    {"shape": [O, -I], "blocksize": 64},
    [],
]


@pytest.mark.parametrize("said", HOSTILE)
def test_settings_that_say_nonsense_are_a_reason(said):
    state = {
        "fc.weight": unsigned(8, O * I // 2, 1).to(torch.uint8),
        "fc.weight.absmax": positive(O),
        "fc.weight.quant_map": torch.randn(16),
        "fc.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(said).encode()), dtype=torch.uint8
        ),
        "sound": torch.randn(5, 6),
    }
    report = rmsgd.probe(state)
    if said and said["blocksize"] == 2**62:  # one block, and more scales than it needs
        assert len(report.measured) == 2
    else:
        assert [layer.name for layer in report.measured] == ["sound"]


@pytest.mark.parametrize(
    "config", ["[" * 100_000, "[]", '{"quantization": 3}', '{"quantization": {"bits": "4"}}']
)
def test_a_config_that_says_nonsense_is_no_config(tmp_path, config):
    state = {"fc.weight": stream(unsigned(4, O, I), 4).view(torch.uint32), "fc.scales": positive(O, 2)}
    path = saved(tmp_path, {**state, "fc.biases": positive(O, 2)})
    (tmp_path / "config.json").write_text(config)
    report = rmsgd.probe(path)
    assert report.measured == ()
    assert report.errors == ()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_packed_linear_layer_of_torch_is_found_in_its_state_dict():
    weight = torch.quantize_per_tensor(torch.randn(O, I), 0.02, 3, torch.qint8)
    assert_stands_for({"fc.weight": weight}, weight.dequantize())
