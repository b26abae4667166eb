"""A trained head from Python: text to latents, steering, the logit lens."""
