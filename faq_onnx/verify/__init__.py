"""Is the result right: structure, kernels, logits."""
