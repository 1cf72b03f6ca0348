"""GPTQ of Olive, from a checkpoint through its ModelBuilder to an ONNX file.

    python olive_gptq.py HF_FOLDER OUT_FOLDER --block-size 32 --feeds FOLDER

Runs in an environment that has olive-ai, onnxruntime-genai 0.14 and transformers 4.57. FOLDER
holds one .npz with the input_ids of each calibration window; OUT_FOLDER/model.onnx is written.
Nothing of faq_onnx is imported. The head is left out of the calibration and of the builder's
rounding. Set OLIVE_DISABLE_TELEMETRY=1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olive.data.registry import Registry
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.model_builder import ModelBuilder
from olive.passes.pytorch.gptq import Gptq


@Registry.register_dataset("windows")  # type: ignore[untyped-decorator]
def windows(folder: str, **_: Any) -> list[tuple[dict[str, torch.Tensor], int]]:
    """(inputs, label) per window, batches of one."""
    rows = [np.load(path)["input_ids"] for path in sorted(Path(folder).glob("*.npz"))]
    return [
        ({"input_ids": torch.tensor(row), "attention_mask": torch.ones(row.shape).long()}, 0)
        for row in rows
    ]


def main() -> None:
    """Quantize one checkpoint."""
    args = _parse()
    data = {
        "name": "windows",
        "load_dataset_config": {"type": "windows", "params": {"folder": str(args.feeds)}},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    }
    gptq = {
        "bits": 4,
        "group_size": args.block_size,
        "sym": False,
        "lm_head": False,
        "data_config": data,
    }
    builder = {
        "precision": "int4",
        "int4_block_size": args.block_size,
        "extra_options": {"int4_nodes_to_exclude": ["/lm_head/MatMul"], "filename": "model.onnx"},
    }
    model = HfModelHandler(model_path=str(args.source))
    rounded = create_pass_from_dict(Gptq, gptq, disable_search=True).run(
        model, str(args.output / "checkpoint")
    )
    create_pass_from_dict(ModelBuilder, builder, disable_search=True).run(
        rounded, str(args.output)
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--feeds", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
