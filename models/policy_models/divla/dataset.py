"""Demonstrations of sorting as batches: what one DiVLA training step sees."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy_models.divla.prompt import Template, Vocabulary
from policy_models.normalizer import Normalizer, Statistics
from policy_sim.sorting_words import THINGS


@dataclass(frozen=True)
class Sequences:
    """Prompts with their answers, as the graph `read` takes them: padding left of a prompt and right of an answer.

    Attributes:
        tokens: (B, L + R) int64.
        places: Which image token stands here, -1 for words, (B, L + R) int64.
        positions: (B, 3, L + R) int64.
        prefix: Where the prompt stands, (B, L + R) bool.
        answer: Where the answer stands, its end included, (B, L + R) bool.
        thought: Where that of the answer stands which the head is told of: all but its end, (B, L + R) bool.
    """

    tokens: Tensor
    places: Tensor
    positions: Tensor
    prefix: Tensor
    answer: Tensor
    thought: Tensor

    @property
    def mask(self) -> Tensor:
        """Where anything stands, (B, L + R) int64."""
        return (self.prefix | self.answer).long()


class Sentences:
    """All instructions and all reasonings of the demonstrations, tokenized once."""

    def __init__(self, template: Template, vocabulary: Vocabulary, demos: Mapping[str, np.ndarray]) -> None:
        prompts = [template.write(str(instruction)) for instruction in demos["instructions"]]
        length = max(len(prompt.tokens) for prompt in prompts)
        prompts = [prompt.padded(length, vocabulary.special.pad) for prompt in prompts]
        self._tokens, self._places, self._mask = (
            torch.from_numpy(np.stack([getattr(prompt, name) for prompt in prompts]))
            for name in ("tokens", "places", "mask")
        )
        self._positions = torch.from_numpy(np.stack([prompt.positions for prompt in prompts]))
        self._next = torch.tensor([prompt.next_position for prompt in prompts])
        answers = [vocabulary.answer(str(reasoning)) for reasoning in demos["reasonings"]]
        self.longest = max(map(len, answers))
        self._answers = torch.full((len(answers), self.longest), vocabulary.special.pad)
        self._said = torch.tensor([len(answer) for answer in answers])
        for row, answer in zip(self._answers, answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)

    def of(self, instructions: np.ndarray, reasonings: np.ndarray) -> Sequences:
        """Return the sequences of instructions and reasonings, (B,) each, by their numbers."""
        asked, said = torch.from_numpy(instructions), torch.from_numpy(reasonings)
        answers, steps = self._answers[said], torch.arange(self.longest)
        prompt = self._mask[asked].bool()
        spoken = steps < self._said[said][:, None]
        positions = (self._next[asked][:, None] + steps)[:, None].expand(-1, 3, -1)
        return Sequences(
            tokens=torch.cat((self._tokens[asked], answers), dim=1),
            places=torch.cat((self._places[asked], torch.full_like(answers, -1)), dim=1),
            positions=torch.cat((self._positions[asked], positions), dim=2),
            prefix=torch.cat((prompt, torch.zeros_like(spoken)), dim=1),
            answer=torch.cat((torch.zeros_like(prompt), spoken), dim=1),
            thought=torch.cat((torch.zeros_like(prompt), steps < self._said[said][:, None] - 1), dim=1),
        )


@dataclass(frozen=True)
class Batch:
    """Demonstrated chunks with what was seen, ordered and thought before them.

    Attributes:
        images: (B, 1, h, w, 3) uint8.
        state: (B, S), normalised.
        actions: (B, H, A), normalised.
        sequences: Prompts and answers.
        own: Whether the answer is the demonstrator's own, (B,) bool; another one's is acted on, but not learned.
        present: Which things are to be seen, (B, K) bool.
        places: Where, (B, K, 2) m; zeros for those that are not.
    """

    images: Tensor
    state: Tensor
    actions: Tensor
    sequences: Sequences
    own: Tensor
    present: Tensor
    places: Tensor


class Demonstrations:
    """Every observation of some episodes, ready to be drawn at random."""

    def __init__(self, demos: Mapping[str, np.ndarray], sentences: Sentences, normalizer: Normalizer) -> None:
        """Take over `demos`, as `policy_sim.sorting_demos` made them; images are not copied."""
        self._sentences = sentences
        self._images, self._instructions = demos["image"], demos["instruction"]
        self._state = torch.from_numpy(normalizer.normalize_state(demos["state"]))
        self._reasonings = np.stack([demos["reasoning"], demos["other_reasoning"]])
        self._actions = torch.from_numpy(
            np.stack([normalizer.normalize_action(demos[name]) for name in ("actions", "other_actions")])
        )
        self._things, self._where = demos["things"], torch.from_numpy(demos["places"])

    def __len__(self) -> int:
        """How many observations there are."""
        return len(self._images)

    def draw(self, count: int, others: float, rng: np.random.Generator) -> Batch:
        """Draw `count` observations.

        Args:
            count: How many.
            others: Part of them that come with another reasoning than the demonstrator's, and the actions that follow
                it. Without them an instruction would tell all that a reasoning does, and nobody would listen.
            rng: Decides.
        """
        return self.batch(rng.integers(len(self), size=count), rng.random(count) < others)

    def batch(self, rows: np.ndarray, other: np.ndarray) -> Batch:
        """Return the observations `rows`, (B,), with another's reasoning where `other` is set, (B,) bool."""
        which = other.astype(np.int64)
        which_row, slot = np.nonzero(self._things[rows] >= 0)
        seen = which_row, self._things[rows][which_row, slot]
        present = torch.zeros(len(rows), len(THINGS), dtype=torch.bool)
        places = torch.zeros(len(rows), len(THINGS), 2)
        present[seen], places[seen] = True, self._where[rows][which_row, slot]
        return Batch(
            torch.from_numpy(self._images[rows])[:, None],
            self._state[rows],
            self._actions[which, rows],
            self._sentences.of(self._instructions[rows], self._reasonings[which, rows]),
            torch.from_numpy(~other),
            present,
            places,
        )


def statistics_of(demos: Mapping[str, np.ndarray], low: tuple[float, ...], high: tuple[float, ...]) -> Normalizer:
    """Return what scales states and actions; actions by their limits, (A,) each, which end at -1 and 1."""
    state = demos["state"].astype(np.float64)
    zeros, ones = (0.0,) * len(low), (1.0,) * len(low)
    of_state = Statistics(*(tuple(map(float, values)) for values in _moments(state)))
    return Normalizer(of_state, Statistics(zeros, ones, low, high), clip=1.0)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # As upstream, no deviation counts as less than 0.01: what hardly ever changes must not be blown up.
    return values.mean(0), np.maximum(values.std(0), 1e-2), values.min(0), values.max(0)
