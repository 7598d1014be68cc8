"""DP²O-SR: direct perceptual preference optimization of generative super-resolution models."""

__version__ = "0.1.0"
