"""Moving tensors out of and into serialized models."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from faq_onnx.graph.wire import Payload, WireError, attach_tensors, detach_tensors


def _model_bytes(count: int = 4096, *, data_location: bool = False) -> bytes:
    tensor = onnx.TensorProto(name="w", dims=[count], data_type=onnx.TensorProto.UINT8)
    tensor.raw_data = bytes(index % 251 for index in range(count))
    if data_location:
        tensor.data_location = onnx.TensorProto.DEFAULT
    model = onnx.ModelProto(ir_version=8)
    model.graph.initializer.append(tensor)
    model.graph.name = "after the tensor in the file"
    serialized: bytes = model.SerializeToString()
    return serialized


@pytest.mark.parametrize("data_location", [False, True])
def test_detached_tensor_points_at_its_bytes(*, data_location: bool) -> None:
    data = _model_bytes(data_location=data_location)
    skeleton = onnx.ModelProto.FromString(detach_tensors(data))
    tensor = skeleton.graph.initializer[0]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(entries["offset"]), int(entries["length"])
    assert tensor.data_location == onnx.TensorProto.EXTERNAL
    assert not tensor.HasField("raw_data")
    assert data[offset : offset + length] == bytes(index % 251 for index in range(4096))
    assert skeleton.graph.name == "after the tensor in the file"


def test_small_tensors_stay() -> None:
    data = _model_bytes(64)
    assert detach_tensors(data) == data


def test_attaching_restores_the_tensor() -> None:
    data = _model_bytes()
    expected = onnx.ModelProto.FromString(data)
    skeleton = onnx.ModelProto.FromString(detach_tensors(data))
    entries = {entry.key: entry for entry in skeleton.graph.initializer[0].external_data}
    entries["offset"].value = "0"  # the number of the tensor
    written = b"".join(
        expected.graph.initializer[piece.index].raw_data if isinstance(piece, Payload) else piece
        for piece in attach_tensors(skeleton.SerializeToString())
    )
    assert onnx.ModelProto.FromString(written) == expected


def test_tensors_in_bodies_and_attributes_are_found() -> None:
    weight = ", ".join(["1.0"] * 512)
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        g (bool c) => (float[512] y) {{
            y = If (c) <
                then_branch = t () => (float[512] a) {{
                    a = Constant <value = float[512] {{{weight}}}> ()
                }},
                else_branch = e () => (float[512] b) {{
                    b = Constant <value = float[512] {{{weight}}}> ()
                }}
            >
        }}"""
    )
    proto = ir.to_proto(model)
    for branch in proto.graph.node[0].attribute:
        value = branch.g.node[0].attribute[0].t
        value.raw_data = bytes(2048)
        value.ClearField("float_data")
    data = proto.SerializeToString()
    assert len(data) - len(detach_tensors(data)) > 2 * 1800


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_truncation_is_seen(cut: int) -> None:
    with pytest.raises(WireError, match="byte"):
        detach_tensors(_model_bytes()[:-cut])


def test_deep_nesting_is_refused() -> None:
    graph = b"\x0a\x00"
    for _ in range(60):  # node -> attribute -> graph
        for number in (6, 5, 1):
            length = len(graph)
            size = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
            graph = bytes([number << 3 | 2]) + size + graph
    padding = b"\x12\x90\x4e" + bytes(10_000)
    inner = graph + padding
    length = len(inner)
    header = bytes([7 << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
    assert detach_tensors(header + inner)  # 180 levels of small messages are not entered
    with pytest.raises(WireError, match="deeper"):
        list(attach_tensors(_nested(b"\x7ffaq-onnx-inline", 60)))


def _nested(core: bytes, depth: int) -> bytes:
    body = b"\x12" + bytes([len(core)]) + core
    for _ in range(depth):
        for number in (6, 5, 1):
            length = len(body)
            size = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
            body = bytes([number << 3 | 2]) + size + body
    length = len(body)
    return (
        bytes([7 << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + body
    )
