"""A package of faq-onnx in optimum, as it is.

python optimum_generate.py out/ 'Once upon a time'
"""

from __future__ import annotations

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main(folder: str, prompt: str) -> None:
    """Continue a prompt by 16 greedy tokens; prints ids and text as JSON."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ORTModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()
    given = inputs["input_ids"].shape[1]
    text = tokenizer.decode(found)
    sys.stdout.write(json.dumps({"prompt": found[:given], "ids": found[given:], "text": text}))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
