"""From text to activations: packed rows of tokens, buffers and caches of activations."""
