"""Name maps between the layouts that checkpoints come in and diffusers' (or our) names; no files, no models."""
