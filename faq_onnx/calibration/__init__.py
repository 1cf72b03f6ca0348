"""Token windows, and what the activations look like while the model reads them."""
