"""Running models with onnxruntime: sessions, feeds, text generation."""
