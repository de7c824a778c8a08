"""World models pre-trained on action-free video with latent actions, on TorchRL.

Shape legend, everywhere: B batch, T time, C H W image, E embedding, S stochastic variables,
K classes of each, D deterministic state, F feature = S*K + D, A action, U latent action,
N transitions or imagined trajectories, H horizon.
"""

__version__ = "0.1.0"
