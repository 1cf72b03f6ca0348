"""ONNX files in and out within a memory bound, and reading and changing single weights."""
