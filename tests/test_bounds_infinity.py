"""No setting is infinite: training would diverge, or never begin, without a word."""

from __future__ import annotations

import pytest

from prelar_trl.recipes.schema import CollectVideosConfig, FinetuneConfig, PrepareVideosConfig

INF = float("inf")


@pytest.mark.parametrize(
    ("settings", "values", "name"),
    [
        (FinetuneConfig, {"lr": INF}, "lr"),
        (FinetuneConfig, {"train_every": INF}, "train_every"),
        (FinetuneConfig, {"loss": {"free_nats": INF}}, "loss.free_nats"),
        (FinetuneConfig, {"loss": {"temperature": INF}}, "loss.temperature"),
        (CollectVideosConfig, {"noise": INF}, "noise"),
        (PrepareVideosConfig, {"white": INF}, "white"),
    ],
)
def test_infinity_is_refused(settings: type, values: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=inf must be finite"):
        settings(**values)
    assert settings(**{key: {} if isinstance(x, dict) else 1.0 for key, x in values.items()})
