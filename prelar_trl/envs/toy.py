"""A tiny pixel task that a small agent learns in minutes: steer a disc onto a square.

Both lie in the square [-1, 1]^2. An action is a velocity in [-1, 1]^2; one step moves the disc by
``SPEED`` times it. With ``gap`` = the distance beyond ``RADIUS`` between the two centers,

    reward = 1 / (1 + (gap / SCALE)^2)        1 on the target, 0.5 at gap = SCALE, never 0

and ``success`` means ``gap = 0``. At each reset the disc starts anywhere and the target lies at one
of the four places (+-0.6, +-0.6). The best policy goes straight to the target and stays;
:func:`toy_return` measures it.

``toy/shifted`` is the same task in other colors, on a texture: for videos unlike the task.
``toy/discrete`` takes one of nine moves, as a one-hot vector: :data:`MOVES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, Transform

SPEED = 0.2
TARGET = 0.6
RADIUS = 0.15
SCALE = 0.3
EPISODE_STEPS = 50
_DISC, _SQUARE = 0.24, 0.26  # radius and half side, in world units
MOVES = torch.cartesian_prod(*2 * [torch.tensor([-1.0, 0.0, 1.0])])  # velocities [9, 2]
WAVES = 3  # of a textured background, along each side of the picture

Color = tuple[int, int, int]
VARIANTS: dict[str, dict[str, Any]] = {
    "toy": {},
    "toy/shifted": {
        "background": ((150, 120, 80), (214, 196, 150)),
        "disc": (48, 96, 224),
        "square": (120, 40, 136),
    },
    "toy/discrete": {"discrete": True},
}


def toy_dynamics(
    position: torch.Tensor, target: torch.Tensor, action: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step. All inputs float32 [..., 2].

    Returns:
        the new position [..., 2], reward [..., 1] and success, bool [..., 1].
    """
    position = (position + SPEED * action.clamp(-1, 1)).clamp(-1, 1)
    gap = (torch.linalg.vector_norm(position - target, dim=-1, keepdim=True) - RADIUS).clamp(min=0)
    return position, 1 / (1 + (gap / SCALE) ** 2), gap == 0


def toy_expert(tensordict: TensorDictBase) -> TensorDictBase:
    """The best policy: reads ``state`` [..., 4], writes ``action`` [..., 2]."""
    position, target = tensordict["state"].split(2, dim=-1)
    return tensordict.set("action", _straight_to(position, target))


def _straight_to(position: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The velocity along the straight line that gets nearest to the target in one step."""
    velocity = (target - position) / SPEED
    return velocity / velocity.abs().amax(-1, keepdim=True).clamp(min=1)


def toy_return(
    policy: Literal["expert", "random"],
    *,
    steps: int = EPISODE_STEPS,
    episodes: int = 10_000,
    seed: int = 0,
) -> float:
    """Mean episode return of the best or of the uniformly random policy, without any pictures.

    With the defaults: expert 47.8 of at most 50, random 10.4.
    """
    generator = torch.Generator().manual_seed(seed)
    position, target = draw_start((episodes, 2), generator)
    total = torch.zeros(episodes, 1)
    for _ in range(steps):
        if policy == "expert":
            action = _straight_to(position, target)
        else:
            action = _uniform((episodes, 2), generator)
        position, reward, _ = toy_dynamics(position, target, action)
        total += reward
    return total.mean().item()


def draw_start(
    shape: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where an episode starts: position and target, both of ``shape`` [..., 2]."""
    return _uniform(shape, generator), TARGET * _uniform(shape, generator).sign()


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


class ToyEnv(EnvBase):
    """The toy task as a TorchRL environment without batch size; it never ends by itself.

    Gives ``pixels`` uint8 [3, size, size], ``state`` float32 [4] (disc x, y, target x, y),
    ``success`` and ``reward``; takes ``action`` float32 [2] in [-1, 1]. Colors are RGB, 0 to 255.

    Args:
        size: height and width of the picture; ``None`` draws none.
        background: one color, or two that blend into each other in a fixed texture of waves.
        disc: the color of the disc, which is steered.
        square: the color of the target.
        discrete: takes one of the nine moves instead, one-hot float32 [9].
    """

    def __init__(
        self,
        size: int | None = 64,
        *,
        background: Color | tuple[Color, Color] = (32, 32, 48),
        disc: Color = (255, 64, 64),
        square: Color = (64, 224, 96),
        discrete: bool = False,
    ) -> None:
        super().__init__(device="cpu", batch_size=torch.Size([]))
        self._generator = torch.Generator().manual_seed(0)
        self._size = size
        observation = {
            "state": Bounded(-1, 1, torch.Size([4]), dtype=torch.float32),
            "success": Binary(1, torch.Size([1]), dtype=torch.bool),
        }
        if size is not None:
            observation["pixels"] = Bounded(0, 255, torch.Size([3, size, size]), dtype=torch.uint8)
            margin = 1 + _SQUARE  # both shapes stay inside the picture
            centers = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32) * margin
            self._y, self._x = -centers[:, None], centers[None, :]  # y points up
            self._pixel = 2 * margin / size
            self._background = _texture(background, size)
            self._disc, self._square = _as_image(disc), _as_image(square)
        self.observation_spec = Composite(observation)
        self._discrete = discrete
        if discrete:
            self.action_spec = OneHot(len(MOVES), dtype=torch.float32)
        else:
            self.action_spec = Bounded(-1, 1, torch.Size([2]), dtype=torch.float32)
        self.reward_spec = Unbounded(torch.Size([1]), dtype=torch.float32)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs) -> TensorDictBase:
        self._position, self._target = draw_start((2,), self._generator)
        return TensorDict({**self._observe(), "success": torch.zeros(1, dtype=torch.bool)})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"]
        velocity = action @ MOVES if self._discrete else action
        self._position, reward, success = toy_dynamics(self._position, self._target, velocity)
        over = {key: torch.zeros(1, dtype=torch.bool) for key in ("done", "terminated")}
        return TensorDict({**self._observe(), "success": success, "reward": reward, **over})

    def _observe(self) -> dict[str, torch.Tensor]:
        observation = {"state": torch.cat([self._position, self._target])}
        if self._size is not None:
            observation["pixels"] = self.draw(self._position, self._target)
        return observation

    def draw(self, position: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The picture, edges smoothed over one pixel so that it shows positions exactly."""
        x, y, tx, ty = *position.tolist(), *target.tolist()
        square = _SQUARE - np.maximum(np.abs(self._x - tx), np.abs(self._y - ty))
        disc = _DISC - np.sqrt((self._x - x) ** 2 + (self._y - y) ** 2)
        image = self._background
        for depth, color in ((square, self._square), (disc, self._disc)):
            cover = np.clip(depth / self._pixel + 0.5, 0, 1)  # [H, W]
            image = image + cover * (color - image)  # [3, H, W]
        return torch.from_numpy(image.astype(np.uint8))


def _texture(background: Color | tuple[Color, Color], size: int) -> np.ndarray:
    """The background, float32 [3, H, W], or [3, 1, 1] where it has one color."""
    colors = np.array(background, dtype=np.float32)  # [3] or [2, 3]
    if colors.ndim == 1:
        return _as_image(colors)
    wave = np.sin(2 * np.pi * WAVES * (np.arange(size, dtype=np.float32) + 0.5) / size)
    blend = 0.5 + 0.5 * wave[:, None] * wave  # [H, W]
    first, second = (_as_image(color) for color in colors)
    return first + blend * (second - first)


def _as_image(color: ArrayLike) -> np.ndarray:
    return np.asarray(color, dtype=np.float32)[:, None, None]  # [3, 1, 1]


def play_toy(
    position: torch.Tensor,
    target: torch.Tensor,
    actions: torch.Tensor,
    env: str = "toy",
    size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes when ``actions`` are played, frame by frame: the toy tells what no video does.

    Args:
        position, target: of the disc and the square at first, float32 ``[B, 2]``.
        actions: ``[B, T, 2]``.
        env: ``toy`` or ``toy/shifted``.
        size: height and width of the frames. Default: 64.

    Returns:
        The first frame and those after each action, uint8 ``[B, T+1, 3, size, size]``, and the
        disc's positions, ``[B, T+1, 2]``.
    """
    painter = ToyEnv(size, **VARIANTS[env])
    positions = [position]
    for action in actions.unbind(1):
        positions.append(toy_dynamics(positions[-1], target, action)[0])
    path = torch.stack(positions, 1)
    frames = [
        torch.stack([painter.draw(disc, place) for disc in row])
        for row, place in zip(path, target, strict=True)
    ]
    return torch.stack(frames), path


def make_toy(
    variant: str, *, pixels: int | None, cameras: Sequence[str], render_quality: str
) -> tuple[EnvBase, list[Transform]]:
    """The toy task; it has one view, in one quality. See :func:`prelar_trl.envs.make_env`.

    Args:
        variant: ``""`` for the task itself, ``shifted`` or ``discrete``.
    """
    name = f"toy/{variant}" if variant else "toy"
    if name not in VARIANTS:
        raise ValueError(f"unknown environment {name!r}; choose {', '.join(VARIANTS)}")
    if cameras:
        raise ValueError(f"toy has no cameras to choose from, got {', '.join(cameras)}")
    return ToyEnv(pixels, **VARIANTS[name]), []
