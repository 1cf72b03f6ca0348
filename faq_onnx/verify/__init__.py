"""Is the result right: structure, kernels, logits, and is it more than round-to-nearest?"""
