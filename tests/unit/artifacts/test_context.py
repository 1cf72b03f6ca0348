"""How long texts may be."""

from __future__ import annotations

import pytest

from faq_onnx.artifacts.source import context_length


@pytest.mark.parametrize(
    ("config", "length"),
    [(None, 2048), ({"max_position_embeddings": 512}, 512), ({"n_positions": "?"}, 2048)],
)
def test_the_context_length_comes_from_the_config(
    config: dict[str, object] | None, length: int
) -> None:
    assert context_length(config) == length
