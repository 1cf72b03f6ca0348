"""Future-Aware Quantization of ONNX language models."""

__version__ = "0.1.0"
