"""The feature dashboard: one page of HTML about all latents of a head, complete in itself."""
