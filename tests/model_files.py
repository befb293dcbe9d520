"""Files of other projects' formats, made byte by byte: GGUF and ONNX."""

import struct

import torch


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# -- GGUF ----------------------------------------------------------------------------------------


def gguf(tensors, alignment=32):
    """A GGUF file of name -> (type number, shape, bytes), with settings of several types."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    settings = [
        text("general.alignment") + struct.pack("<II", 4, alignment),
        text("general.name") + struct.pack("<I", 8) + text("a model"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("scores") + struct.pack("<IIQ", 9, 6, 3) + bytes(12),
        text("flag") + struct.pack("<I?", 7, True),
    ]
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)) + b"".join(settings) + infos
    return head + bytes(-len(head) % alignment) + data


def q8_0(codes, scales):
    blocks = zip(codes.reshape(-1, 32), scales.half(), strict=True)
    return b"".join(raw(scale.reshape(1)) + raw(code) for code, scale in blocks)


# -- ONNX ----------------------------------------------------------------------------------------


def varint(value):
    rest = value >> 7
    return bytes([value & 0x7F | 0x80]) + varint(rest) if rest else bytes([value])


def message(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def integer(number, value):
    return varint(number << 3) + varint(value)


def initialiser(name, kind, shape, *fields):
    dims = message(1, b"".join(map(varint, shape)))
    return message(5, dims + integer(2, kind) + message(8, name.encode()) + b"".join(fields))


def constant(output, kind, shape, *fields):
    """A node that returns a tensor."""
    dims = message(1, b"".join(map(varint, shape)))
    value = message(1, b"value") + message(5, dims + integer(2, kind) + b"".join(fields))
    return message(1, message(2, output.encode()) + message(4, b"Constant") + message(5, value))


def branches(*graphs):
    """A node with a graph for each of its branches."""
    attributes = (message(5, message(1, b"branch") + message(6, graph)) for graph in graphs)
    return message(1, message(2, b"out") + message(4, b"If") + b"".join(attributes))


def onnx(*parts):
    node = message(1, message(4, b"MatMul"))
    graph = node + message(2, b"graph") + b"".join(parts)
    return integer(1, 8) + message(2, b"pytorch") + message(7, graph) + message(8, integer(2, 17))


def entry(key, value):
    return message(13, message(1, key.encode()) + message(2, value.encode()))
