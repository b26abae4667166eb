"""An LLM as judge of latents: the questions it is asked, and the client that asks them."""
