"""PreLAR's losses on TorchRL's own DreamerV3: pre-training on video, then fine-tuning.

python examples/torchrl_dreamerv3.py

Video phase: an inverse-dynamics model infers the actions that the prior takes; its losses stand
beside TorchRL's model loss. Fine-tuning: an action encoder takes its place, and TorchRL's actor and
value losses train the behavior in imagination. Both phases share every other network.
"""

from pathlib import Path

import torch
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import ExcludeTransform, TensorDictPrimer
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import (
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    RSSMStateEstimatorV3,
    TanhNormal,
    WorldModelWrapper,
)
from torchrl.objectives import (
    DreamerV3ActorLoss,
    DreamerV3Loss,
    DreamerV3ModelLoss,
    DreamerV3ValueLoss,
    SoftUpdate,
)

from prelar_trl.data import EpisodeReplay, VideoClips, to_dreamer_v3
from prelar_trl.envs import make_env
from prelar_trl.modules import (
    V3_KEYS,
    ActionEncoder,
    CNNEncoder,
    InferredActions,
    LatentActionEncoder,
    PriorV3Logits,
    make_latent_actions,
)
from prelar_trl.objectives import LatentActionLoss, total_loss
from prelar_trl.recipes.collect_videos import collect
from prelar_trl.recipes.schema import CollectVideosConfig

S, K, D, U, A = 16, 16, 256, 16, 2  # variables, classes, belief, latent action, action
LAYOUT = {"state_dim": S * K, "belief_dim": D}
LATENT = ["state", "belief"]


class Networks(nn.Module):
    """What both phases share, of ``units`` each."""

    def __init__(self, depth: int = 8, units: int = 256) -> None:
        super().__init__()
        mults, latent = (1, 2, 4, 8), {"num_categoricals": S, "num_classes": K}
        rnn = {"hidden_dim": units, "rnn_hidden_dim": D, **latent}
        self.encoder = DreamerV3ImageEncoder(depth=depth, mults=mults)
        embed = self.encoder.output_features((3, 64, 64))
        self.prior = RSSMPriorV3(action_shape=(U,), action_dim=U, **rnn)
        self.posterior = RSSMPosteriorV3(obs_embed_dim=embed, **rnn)
        self.decoder = DreamerV3ImageDecoder(S * K + D, depth=depth, mults=mults)
        self.reward = DreamerV3MLP(S * K + D, 1, depth=2, num_cells=units, outscale=0.0)

    def world_model(self, actions: nn.Module) -> TensorDictSequential:
        """DreamerV3's model, whose actions are what the module ``actions`` writes."""
        latent = [("next", key) for key in LATENT]
        rollout = RSSMRolloutV3(
            TensorDictModule(
                self.prior, [*LATENT, "latent_action"], [("next", "prior_logits"), *latent]
            ),
            TensorDictModule(
                self.posterior,
                [("next", "belief"), ("next", "encoded_latents")],
                [("next", "posterior_logits"), ("next", "state")],
            ),
        )
        return TensorDictSequential(
            TensorDictModule(self.encoder, [("next", "pixels")], [("next", "encoded_latents")]),
            actions,
            rollout,
            TensorDictModule(self.decoder, latent, [("next", "reco_pixels")]),
            TensorDictModule(self.reward, latent, [("next", "reward")]),
        )

    def model_loss(self, actions: nn.Module, **weights: float) -> DreamerV3ModelLoss:
        return DreamerV3ModelLoss(
            self.world_model(actions),
            kl_mode="separate",
            reco_symlog=False,
            reward_two_hot=False,
            detach_output=False,
            **weights,
        )


def descend(optimizer: torch.optim.Optimizer, losses) -> float:
    loss = total_loss(losses)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 100.0)
    optimizer.step()
    return loss.item()


def pretrain(networks: Networks, clips: VideoClips, updates: int) -> list[float]:
    """The loss of every update."""
    kind = make_latent_actions("gaussian", size=U)
    actions = InferredActions(
        LatentActionEncoder(CNNEncoder(3, depth=8), kind, frames="diff", hidden=256)
    )
    model_loss = networks.model_loss(actions, lambda_reward=0.0)
    latent_loss = LatentActionLoss(
        PriorV3Logits(networks.prior),
        kind,
        weights={"latent_kl": 0.01, "action_state_consistency": 0.1},
    )
    latent_loss.set_keys(**V3_KEYS)
    optimizer = torch.optim.Adam(model_loss.parameters(), lr=3e-4)
    history = []
    for _ in range(updates):
        losses, predicted = model_loss(to_dreamer_v3(clips.sample(), **LAYOUT))
        history.append(descend(optimizer, losses.update(latent_loss(predicted))))
    return history


def make_actor(units: int) -> ProbabilisticTensorDictSequential:
    network = DreamerV3MLP(S * K + D, 2 * A, depth=2, num_cells=units, outscale=0.01)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(network, LATENT, ["params"]),
        TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        ),
    )


def make_imagination(networks: Networks, action_encoder: ActionEncoder) -> DreamerEnv:
    """TorchRL's imagination environment, in which a real action becomes a latent one first."""
    env = DreamerEnv(
        WorldModelWrapper(
            TensorDictSequential(
                TensorDictModule(action_encoder, ["action"], ["latent_action", "_"]),
                TensorDictModule(networks.prior, [*LATENT, "latent_action"], ["_", *LATENT]),
            ),
            TensorDictModule(networks.reward, LATENT, ["reward"]),
        ),
        prior_shape=(S * K,),
        belief_shape=(D,),
    )
    env.observation_spec = Composite(state=Unbounded(S * K), belief=Unbounded(D))
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Bounded(-1, 1, (A,)), Unbounded((1,))
    return env


def finetune(
    networks: Networks, replay: EpisodeReplay, *, steps: int, prefill: int, every: int, units: int
) -> list[float]:
    """The return of every episode."""
    action_encoder = ActionEncoder(A, make_latent_actions("deterministic", size=U), hidden=units)
    actor = make_actor(units)
    value = TensorDictModule(
        DreamerV3MLP(S * K + D, 1, depth=2, num_cells=units, outscale=0.0), LATENT, ["state_value"]
    )
    model_loss = networks.model_loss(
        TensorDictModule(action_encoder, ["action"], ["latent_action", "_"])
    )
    actor_loss = DreamerV3ActorLoss(actor, value, make_imagination(networks, action_encoder))
    value_loss = DreamerV3ValueLoss(value, actor_loss=actor_loss, slow_critic_regularization=1.0)
    target_update = SoftUpdate(value_loss, tau=0.02)
    loss = DreamerV3Loss(model_loss, actor_loss, value_loss)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)

    policy = TensorDictSequential(
        TensorDictModule(networks.encoder, ["pixels"], ["encoded_latents"]),
        TensorDictModule(action_encoder, ["previous_action"], ["previous_latent", "_"]),
        RSSMStateEstimatorV3(
            networks.prior,
            networks.posterior,
            in_keys=[*LATENT, "previous_latent", "encoded_latents", "is_first"],
        ),
        actor,
        TensorDictModule(
            lambda *now: now,
            [*LATENT, "action"],
            [("next", key) for key in (*LATENT, "previous_action")],
        ),
    )
    primer = TensorDictPrimer(
        state=Unbounded(S * K), belief=Unbounded(D), previous_action=Unbounded(A), default_value=0.0
    )
    env = make_env("toy").append_transform(ExcludeTransform("state"))  # the simulator's
    env = env.append_transform(primer)
    collector = Collector(
        env,
        policy,
        frames_per_batch=every,
        total_frames=steps,
        init_random_frames=prefill,
        auto_register_policy_transforms=False,  # is_first takes the place of is_init
    )
    returns, seen = [], 0
    for data in collector:
        replay.extend(data)
        seen += data.numel()
        returns += data["next", "episode_reward"][data["next", "done"]].tolist()
        if seen > prefill:
            for _ in range(every // 5):
                descend(optimizer, loss(to_dreamer_v3(replay.sample(), **LAYOUT)))
                target_update.step()
    collector.shutdown()
    return returns


def main(
    folder: str | Path = "runs/torchrl_dreamerv3",
    *,
    videos: int = 100,
    updates: int = 1000,
    steps: int = 5000,
    prefill: int = 500,
    every: int = 50,
    batch: tuple[int, int] = (16, 25),
    units: int = 256,
) -> tuple[list[float], list[float]]:
    """Returns the losses of pre-training and the returns of fine-tuning."""
    folder, (rows, length) = Path(folder), batch
    collect(CollectVideosConfig(data=str(folder / "videos"), env="toy", episodes=videos))
    clips = VideoClips(folder / "videos", clip_len=length, batch_size=rows)
    networks = Networks(units=units)
    losses = pretrain(networks, clips, updates)
    replay = EpisodeReplay(folder / "replay", window=length, batch_size=rows)
    returns = finetune(networks, replay, steps=steps, prefill=prefill, every=every, units=units)
    print(f"pre-training loss {losses[0]:.0f} -> {losses[-1]:.0f}; last return {returns[-1]:.1f}")
    return losses, returns


if __name__ == "__main__":
    main()
