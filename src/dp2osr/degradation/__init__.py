"""Synthesis of low-resolution images: kernels, single operations and the seeded pipeline."""
