"""Demonstrations in Meta-World as batches: what one MoDE training step sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from policy_models.mode.config import TextConfig
from policy_sim.meta_world_tasks import TASKS

CAMERAS = ("static", "wrist")


@dataclass(frozen=True)
class Augmentation:
    """How training images differ from what the cameras saw. Each camera of each sample draws its own.

    Attributes:
        shift_px: Images move by up to this many pixels either way; their edges are repeated where nothing was seen.
        brightness: Up to this fraction of white is added or taken away.
        contrast: Distances from mid-grey grow or shrink by up to this fraction.
    """

    shift_px: int = 3
    brightness: float = 0.08
    contrast: float = 0.15


NO_AUGMENTATION = Augmentation(0, 0.0, 0.0)


@dataclass(frozen=True)
class Batch:
    """Demonstrated chunks with what was seen and said before them."""

    images: tuple[Tensor, ...]  # one per camera, (B, h, w, 3) float32 in 0 .. 255
    actions: Tensor  # (B, H, A)
    phrase: Tensor  # (B,) int64, row of `Phrases.tokens`


class Phrases:
    """The instructions of all tasks, tokenized once.

    Attributes:
        tokens: (phrases, context) int64, padded with zeros.
        tasks: Which task each phrase asks for, (phrases,) int64.
    """

    def __init__(self, task_names: Sequence[str], tokenizer: str, config: TextConfig) -> None:
        """Tokenize; raises ValueError if a phrase is longer than the context."""
        reader = Tokenizer.from_str(tokenizer)
        rows: list[list[int]] = []
        self._of_task: list[tuple[int, int]] = []
        for name in task_names:
            first = len(rows)
            for phrase in TASKS[name].phrases:
                ids = reader.encode(phrase).ids
                if len(ids) > config.context:
                    raise ValueError(f"{phrase!r} has {len(ids)} tokens, the language model reads {config.context}")
                rows.append(ids + [0] * (config.context - len(ids)))
            self._of_task.append((first, len(rows)))
        self.tokens = torch.tensor(rows)
        self.tasks = torch.tensor([task for task, (first, end) in enumerate(self._of_task) for _ in range(first, end)])

    def draw(self, tasks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return for each task, (B,), a random one of its phrases, (B,)."""
        first, end = np.array(self._of_task)[tasks].T
        return rng.integers(first, end)


class Demonstrations:
    """Every observation of some episodes, ready to be drawn at random."""

    def __init__(
        self, demos: Mapping[str, np.ndarray], phrases: Phrases, *, horizon: int, rows: np.ndarray | None = None
    ) -> None:
        """Take over `demos`, as `policy_sim.meta_world_demos` made them; nothing is copied.

        Args:
            demos: Images, actions and tasks.
            phrases: Of the tasks in `demos`, in the same order.
            horizon: Actions in a chunk, at most as many as in `demos`.
            rows: The observations to draw from; None for all.

        Raises:
            ValueError: The demonstrated chunks are shorter than `horizon`.
        """
        if demos["actions"].shape[1] < horizon:
            raise ValueError(f"demonstrated chunks have {demos['actions'].shape[1]} actions, {horizon} are wanted")
        self.phrases = phrases
        self.rows = np.arange(len(demos["actions"])) if rows is None else rows
        self._images = [demos[camera] for camera in CAMERAS]
        self._actions = demos["actions"][:, :horizon]
        self._tasks = demos["task"]

    def __len__(self) -> int:
        """How many observations there are."""
        return len(self.rows)

    @property
    def actions(self) -> np.ndarray:
        """The chunks that can be drawn, (N, H, A)."""
        return self._actions[self.rows]

    def draw(self, count: int, augmentation: Augmentation, rng: np.random.Generator) -> Batch:
        """Draw `count` observations, each with one of its task's phrases."""
        return self.batch(self.rows[rng.integers(len(self.rows), size=count)], augmentation, rng)

    def batch(self, rows: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> Batch:
        """Return the observations `rows`."""
        images = tuple(augment(shifted(seen, rows, augmentation, rng), augmentation, rng) for seen in self._images)
        phrase = self.phrases.draw(self._tasks[rows], rng)
        return Batch(images, torch.from_numpy(self._actions[rows]), torch.from_numpy(phrase))


def split(episodes: np.ndarray, held_out_per_task: int, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those of each task's last `held_out_per_task` episodes."""
    last = [np.unique(episodes[tasks == task])[-held_out_per_task:] for task in np.unique(tasks)]
    held_out = np.isin(episodes, np.concatenate(last))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def shifted(images: np.ndarray, rows: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Return `images[rows]`, (B, h, w, 3), each moved by its own random number of pixels."""
    most = augmentation.shift_px
    if most == 0:
        return images[rows]
    height, width = images.shape[1:3]
    moved = np.empty((len(rows), *images.shape[1:]), dtype=images.dtype)
    offsets = rng.integers(-most, most + 1, size=(len(rows), 2))
    for out, row, (down, right) in zip(moved, rows, offsets, strict=True):
        ys = np.arange(height) - down
        xs = np.arange(width) - right
        np.take(images[row].take(ys, axis=0, mode="clip"), xs, axis=1, out=out, mode="clip")
    return moved


def augment(images: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
    """Return `images`, (B, h, w, 3) uint8, as float32 in 0 .. 255, each with its own brightness and contrast."""
    pixels = torch.from_numpy(images).float()
    shape = (len(images), 1, 1, 1)
    gain = torch.from_numpy(rng.uniform(1 - augmentation.contrast, 1 + augmentation.contrast, shape)).float()
    offset = torch.from_numpy(rng.uniform(-augmentation.brightness, augmentation.brightness, shape)).float()
    if augmentation.contrast or augmentation.brightness:
        pixels = pixels.sub_(127.5).mul_(gain).add_(127.5 + 255 * offset).clamp_(0, 255)
    return pixels
