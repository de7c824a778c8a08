"""Networks of a user's own that give something odd: a clear error, or the right numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from prelar_trl.models import make_world_model_loss
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.modules.actions import ActionEncoder, LatentActionEncoder
from prelar_trl.modules.heads import MLP
from prelar_trl.modules.latent_actions import GaussianActions, LatentActions
from prelar_trl.modules.rssm import RSSM
from prelar_trl.objectives import LatentActionLoss, total_loss
from tests.fuzz import ODD, answer, fuzz, run
from tests.test_objectives import prediction
from tests.tiny import batch, tiny_world_model

Change = Callable[[Tensor], Any]
WIDTH = 5
CHANGES: dict[str, Change] = {
    "as promised": lambda x: x,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "numpy": lambda x: x.detach().numpy(),
    "tuple": lambda x: (x, x),
    "dict": lambda x: {"x": x},
    "none": lambda x: None,
    "wide": lambda x: torch.cat([x, x], -1),
    "narrow": lambda x: x[..., :1],
    "empty": lambda x: x[..., :0],
    "first": lambda x: x[:1],
    "mean": lambda x: x.mean(0),
    "longer": lambda x: torch.cat([x, x[:1]]),
    "half of the batch": lambda x: x[: len(x) // 2],
    "number": lambda x: x.mean(),
    "deep": lambda x: x.unsqueeze(-1),
    "turned": lambda x: x.movedim(-1, 0),
    "second": lambda x: x[:, :1],
    "nan": lambda x: x * math.nan,
    "infinite": lambda x: x + math.inf,
}
RIGHT = {"as promised", "float64", "float16"}  # where they are taken, with the same numbers
SEEN = {"nan", "infinite"}  # in the loss, which the guard of the updates sees


class Encoder(nn.Module):
    """The means of the channels, and a linear layer."""

    def __init__(self, change: Change = lambda x: x, channels: int = 3, **told: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, WIDTH)
        self.change = change
        for name, value in {"embed_dim": WIDTH, **told}.items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Any:
        return self.change(self.linear(images.mean((2, 3))))


class Decoder(nn.Module):
    """Pictures of one color."""

    def __init__(self, change: Change = lambda x: x, features: int = 32, size: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 3)
        self.change, self.size = change, size

    def forward(self, feat: Tensor) -> Any:
        x = self.linear(feat)[..., None, None]
        return self.change(x.expand(-1, -1, self.size, self.size))


def losses_of(model: RSSMWorldModel) -> Tensor:
    torch.manual_seed(0)
    loss = make_world_model_loss("prelar", "pretrain", model)
    return total_loss(loss(batch(3, 4)))


def judged(change: str, found: Tensor | None, expected: Tensor) -> None:
    """A loss is there only where it is right, or the network's NaN is seen in it."""
    if found is None:
        assert change != "as promised"
    elif change in SEEN:
        assert not found.isfinite()
    else:
        assert change in RIGHT, f"{change} was taken"
        rounding = 0.05 if change == "float16" else 1e-3
        torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=rounding)


def judge_changes(budget: Any, found: Callable[[Change], Tensor], *names: str) -> None:
    """Each change of a network's output: an error that has one of the names, or the right loss."""
    expected = found(lambda x: x)

    @given(st.sampled_from(sorted(CHANGES)))
    def check(change: str) -> None:
        judged(change, answer(lambda: found(CHANGES[change]), names=names), expected)

    run(budget, check)


PARTS: dict[str, Callable[[Change], dict[str, nn.Module]]] = {
    "encoder": lambda change: {"encoder": Encoder(change)},
    "decoder": lambda change: {"decoder": Decoder(change)},
}


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in training"])
@pytest.mark.parametrize("part", PARTS)
@fuzz(24)
def test_what_a_network_gives(part: str, later: bool, budget: Any) -> None:
    """At once, when the model is made, or not before it is trained."""

    def found(change: Change) -> Tensor:
        torch.manual_seed(1)
        network = PARTS[part](lambda x: x if later else change(x))
        model = tiny_world_model("prelar", "pretrain", **network)
        network[part].change = change
        return losses_of(model).detach()

    judge_changes(budget, found, part, "mean")  # a loss calls the decoder's pictures its mean


@fuzz(40)
def test_the_width_that_an_encoder_tells(budget: Any) -> None:
    widths = st.sampled_from([WIDTH, WIDTH, -WIDTH, 0, 5.0, True, "5", None, torch.tensor(5)]) | ODD

    @given(widths)
    def check(width: Any) -> None:
        encoder = Encoder(embed_dim=width)
        makers = {
            "world model": lambda: tiny_world_model("prelar", "pretrain", encoder=encoder),
            "latent actions": lambda: LatentActionEncoder(encoder, GaussianActions(size=2)),
        }
        for name, make in makers.items():
            made = answer(make, names=("embed_dim", "encoder"))
            small = type(width) is int and 0 < width < 1e6
            told = small and (width == WIDTH or name == "latent actions")
            assert made is None or told, name
            assert made is not None or type(width) is not int or width != WIDTH

    run(budget, check)


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({"encoder": Encoder(channels=1)}, r"encoder Encoder cannot take float32 \[2, 3, 64, 64\]"),
        ({"decoder": Decoder(features=7)}, r"decoder Decoder cannot take float32 \[2, 32\]: Runt"),
        ({"decoder": Decoder(size=32)}, r"decoder Decoder is float32 \[2, 3, 32, 32\]; .* 64, 64"),
        ({"encoder": Encoder}, "encoder type is no torch.nn.Module: give an instance"),
        ({"decoder": Decoder}, "decoder type is no torch.nn.Module: give an instance"),
        ({"encoder": nn.Flatten()}, "encoder Flatten has no embed_dim, the width E of its output"),
        ({"encoder": Encoder().double()}, "encoder Encoder cannot take float32 .*same dtype"),
    ],
)
def test_a_network_that_does_not_fit_is_told_where_the_model_is_made(networks, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        tiny_world_model("prelar", "pretrain", **networks)
    assert "\n" not in str(error.value)


def test_to_try_a_network_leaves_it_as_it_was() -> None:
    encoder = Encoder()
    encoder.norm = nn.BatchNorm1d(WIDTH)
    encoder.still = nn.Dropout().eval()
    encoder.change = lambda x: encoder.norm(x)
    tiny_world_model("prelar", "pretrain", encoder=encoder)
    assert encoder.training and encoder.norm.training and not encoder.still.training
    assert encoder.norm.num_batches_tracked == 0


def test_a_users_decoder_gets_the_maps_of_the_context() -> None:
    class WithMaps(Decoder):
        def forward(self, feat: Tensor, maps: list[Tensor]) -> Tensor:
            return super().forward(feat)

    model = tiny_world_model("contextwm", "pretrain", decoder=WithMaps())
    assert model(batch())["prediction", "pixels"].shape == (2, 4, 3, 64, 64)
    with pytest.raises(ValueError, match=r"decoder Decoder cannot take float32 \[2, 32\]: TypeE"):
        tiny_world_model("contextwm", "pretrain", decoder=Decoder())


def test_a_decoder_may_tell_its_size_in_a_way_of_its_own() -> None:
    decoder = Decoder()
    decoder.image_size = (64, 64)
    model = tiny_world_model("prelar", "pretrain", decoder=decoder)
    assert model(batch())["prediction", "pixels"].shape == (2, 4, 3, 64, 64)


# ---------------------------------------------------------------------- latent actions


@fuzz(24)
def test_what_the_encoder_of_latent_actions_gives(budget: Any) -> None:
    images = torch.rand(2, 4, 3, 8, 8) - 0.5

    def found(change: Change) -> Tensor:
        torch.manual_seed(0)
        encoder = LatentActionEncoder(Encoder(change, channels=6), GaussianActions(size=2))
        return encoder(images, sample=False)[0].sum().detach()

    judge_changes(budget, found, "latent-action encoder")


class Dynamics(nn.Module):
    """A dynamics of which the result is changed."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.rssm, self.change = RSSM(6, 1, stoch=2, classes=3, deter=5, hidden=4), change

    def forward(self, stoch: Tensor, deter: Tensor, action: Tensor) -> Any:
        return self.change(self.rssm(stoch, deter, action))


@pytest.mark.parametrize("term", ["action_state_consistency", "action_contrast"])
@pytest.mark.parametrize("negatives", [1, 4])
@fuzz(24)
def test_what_the_dynamics_of_a_loss_gives(term: str, negatives: int, budget: Any) -> None:
    data = prediction(False)

    def found(change: Change) -> Tensor:
        torch.manual_seed(0)
        loss = LatentActionLoss(
            Dynamics(change), GaussianActions(size=6), weights={term: 1.0}, negatives=negatives
        )
        return total_loss(loss(data)).detach()

    judge_changes(budget, found, "dynamics")


def test_a_contrast_needs_a_dynamics_with_parameters() -> None:
    def dynamics(stoch: Tensor, deter: Tensor, action: Tensor) -> Tensor:
        return stoch

    with pytest.raises(TypeError, match="dynamics is function; action_contrast needs a torch.nn"):
        LatentActionLoss(dynamics, weights={"action_contrast": 1.0})


class Kind(LatentActions):
    """Tanh of the output; one of its methods gives something else, or one of its sizes is odd."""

    def __init__(self, place: str = "", change: Change = lambda x: x, **told: Any) -> None:
        super().__init__(size=2)
        self.num_outputs, self.dim = 4, 2
        self.place, self.change = place, change
        for name, value in told.items():
            setattr(self, name, value)

    def _given(self, place: str, value: Any) -> Any:
        return self.change(value) if place == self.place else value

    def forward(self, raw: Tensor, sample: bool = True) -> Any:
        mean = raw[..., :2]
        params = torch.stack([mean, raw[..., 2:]], -2)
        found = self._given("action", mean.tanh()), self._given("params", params)
        return self._given("both", found)

    def kl(self, params: Tensor) -> Tensor:
        return self._given("kl", params.square().sum((-1, -2)))

    def distance(self, action_a: Any, params_a: Any, action_b: Any, params_b: Any) -> Tensor:
        return self._given("distance", super().distance(action_a, params_a, action_b, params_b))

    def extra_losses(self, action: Tensor, params: Tensor | None) -> dict[str, Tensor]:
        losses = {"size": self._given("loss", action.square().mean())}
        return self._given("extra_losses", losses)

    def metrics(self, action: Tensor, params: Tensor | None) -> dict[str, Tensor]:
        return self._given("metrics", {"largest": self._given("metric", action.abs().max())})


SCALARS: dict[str, Change] = {
    "vector": lambda x: x.expand(2),
    "one": lambda x: x.reshape(1),
    "float": lambda x: float(x),
    "int64": lambda x: x.long(),
    "none": lambda x: None,
}
DICTS: dict[str, Callable[[dict], Any]] = {
    "none": lambda x: None,
    "tuple": lambda x: tuple(x.items()),
    "tensor": lambda x: next(iter(x.values())),
    "numbers": lambda x: dict(enumerate(x.values())),
}
PAIRS: dict[str, Callable[[tuple], Any]] = {
    "none": lambda x: None,
    "first": lambda x: x[0],
    "three": lambda x: (*x, None),
    "stacked": lambda x: torch.stack([x[0], x[0]]),
}
PLACES: dict[str, dict[str, Callable[[Any], Any]]] = {
    **{place: CHANGES for place in ("action", "params", "kl", "distance")},
    **{place: SCALARS for place in ("loss", "metric")},
    **{place: DICTS for place in ("extra_losses", "metrics")},
    "both": PAIRS,
}
ODDITIES = [(place, change) for place, changes in PLACES.items() for change in changes]


@fuzz(60)
def test_what_a_kind_of_latent_actions_gives(budget: Any) -> None:
    images = torch.rand(2, 4, 3, 8, 8) - 0.5
    states = {"stoch": torch.rand(2, 4, 2, 3), "deter": torch.rand(2, 4, 5)}
    for name in ("posterior", "prior"):
        states[name] = torch.rand(2, 4, 2, 3)

    def found(kind: Kind) -> Tensor:
        torch.manual_seed(0)
        encoder = LatentActionEncoder(Encoder(channels=6), kind)
        dynamics = RSSM(2, 1, stoch=2, classes=3, deter=5, hidden=4)
        weights = {"latent_kl": 1.0, "action_state_consistency": 1.0}
        loss = LatentActionLoss(dynamics, kind, weights=weights)
        action, params = encoder(images)
        data = TensorDict({**states, "latent_action": action}, [2, 4])
        if params is not None:
            data["latent_action_statistics"] = params
        return total_loss(loss(data))

    expected = found(Kind()).detach()

    @given(st.sampled_from(ODDITIES))
    def check(oddity: tuple[str, str]) -> None:
        place, change = oddity
        names = ("Kind", "latent action", "action")
        got = answer(lambda: found(Kind(place, PLACES[place][change])), names=names)
        if got is not None and place == "params" and change not in (RIGHT | SEEN):
            return  # of any shape, as the kind itself reads them
        if place != "metric" or got is None:
            judged(change, got, expected)

    run(budget, check)


@fuzz(40)
def test_the_sizes_that_a_kind_tells(budget: Any) -> None:
    sizes = st.sampled_from([2, 4, 0, -1, 3, 2.0, True, None, "4"]) | ODD

    @given(st.sampled_from(["num_outputs", "dim"]), sizes)
    def check(name: str, size: Any) -> None:
        right = {"num_outputs": 4, "dim": 2}[name]
        for make in (
            lambda kind: LatentActionEncoder(Encoder(channels=6), kind),
            lambda kind: ActionEncoder(3, kind),
        ):
            made = answer(lambda make=make: make(Kind(**{name: size})), names=("Kind",))
            assert (made is not None) == (type(size) is int and size == right)

    run(budget, check)


@pytest.mark.parametrize("change", ["narrow", "wide", "deep", "float64"])
def test_a_kind_that_draws_other_actions_than_its_mode(change: str) -> None:
    class Draws(Kind):
        def forward(self, raw: Tensor, sample: bool = True) -> Any:
            action, params = super().forward(raw)
            return (CHANGES[change](action) if sample else action), params

    for encoder, x in (
        (LatentActionEncoder(Encoder(channels=6), Draws()), torch.rand(2, 4, 3, 8, 8)),
        (ActionEncoder(3, Draws()), torch.rand(2, 4, 3)),
    ):
        found = answer(lambda encoder=encoder, x=x: encoder(x)[0], names=("latent action",))
        assert (found is None) == (change != "float64")


def test_other_modules_of_a_users_own_are_named_by_the_loss() -> None:
    model = tiny_world_model("prelar", "finetune")
    model.heads["reward"] = MLP(model.rssm.feat_dim, 2, 1, 4)
    loss = make_world_model_loss("prelar", "finetune", model)
    assert answer(lambda: loss(batch())) is None
