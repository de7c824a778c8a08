"""World models pre-trained on action-free video with latent actions, on TorchRL."""

__version__ = "0.1.0"
