"""What Qwen2-VL reads and what it answers: its chat template as token ids, and token ids as text. No torch here.

Template and positions are those of Wang et al. 2024 (arXiv:2409.12191, sections 2.1 and 2.2), as transformers has them;
the form of an answer is DexVLA's (Wen et al. 2025).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from policy_models.divla.config import DivlaConfig, EyesConfig
from policy_models.program import UnsuitableGoal

# By what they are for, in the order of Qwen2's vocabulary.
SPECIAL_TOKENS: Mapping[str, str] = {
    "pad": "<|endoftext|>",
    "start": "<|im_start|>",
    "end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
}
NEXT_ACTION = "Next action:"

# Prompts of nearly the same length are padded to the same one, so that robots with other instructions share a batch.
_MULTIPLE = 16
_NO_IMAGE = -1


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the tokens that are no text; they differ from tokenizer to tokenizer."""

    pad: int
    start: int
    end: int
    vision_start: int
    vision_end: int
    image: int


class Vocabulary:
    """A tokenizer, the ids of its special tokens, and the form of an answer."""

    def __init__(self, text: str) -> None:
        """Read the text of a `tokenizer.json`; raises ValueError if it is none or lacks a special token."""
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"tokenizer.json: {error}") from error
        # What stands between < and > in an instruction is text: only this program places images and ends turns.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = {name: self._tokenizer.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}
        found = {name: token for name, token in ids.items() if token is not None}
        if len(found) < len(ids):
            lacking = [token for name, token in SPECIAL_TOKENS.items() if name not in found]
            raise ValueError(f"tokenizer.json lacks {', '.join(lacking)}")
        self.special = SpecialTokens(**found)
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of plain text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without the special ones."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def answer(self, reasoning: str) -> list[int]:
        """Return what the language model is taught to answer; without reasoning it ends its turn at once."""
        words = self.encode(reasoning + NEXT_ACTION) if reasoning else []
        return [*words, self.special.end]

    def listen(self) -> "Listener":
        """Return what turns the tokens of one answer into text."""
        return Listener(self._tokenizer)


class Listener:
    """Turns the tokens of an answer into text as they come, up to the words that end the reasoning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._heard = ""
        self._told = 0

    def hear(self, token: int) -> str:
        """Return the reasoning that this token completes: whole characters, and never the words that end it."""
        self._heard += self._stream.step(self._tokenizer, token) or ""
        return self._tell(reasoning_of(self._heard, held_back=True))

    def close(self) -> str:
        """Return what was held back because it might have become the words that end the reasoning."""
        return self._tell(reasoning_of(self._heard))

    def _tell(self, reasoning: str) -> str:
        new = reasoning[self._told :]
        self._told += len(new)
        return new


def reasoning_of(answer: str, *, held_back: bool = False) -> str:
    """Return the part of an answer before "Next action:".

    Args:
        answer: As much of it as there is.
        held_back: Leave out as well what may become "Next action:" with more text.
    """
    reasoning, found, _ = answer.partition(NEXT_ACTION)
    if held_back and not found:
        begun = (n for n in range(len(NEXT_ACTION) - 1, 0, -1) if answer.endswith(NEXT_ACTION[:n]))
        return answer[: len(answer) - next(begun, 0)]
    return reasoning


@dataclass(frozen=True)
class Prompt:
    """One instruction and its images, as the graph `read` takes them; padding is on the left.

    Attributes:
        tokens: (L,) int64.
        places: Which of the image tokens stands here, -1 for a word, (L,) int64.
        positions: In time, height and width, (3, L) int64.
        mask: 1 for what is read, 0 for padding, (L,) int64.
        next_position: Where the first token of the answer stands, in time, height and width alike.
    """

    tokens: np.ndarray
    places: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    next_position: int

    @property
    def length(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())

    def padded(self, length: int, pad: int) -> "Prompt":
        """Return it with more padding, `length` tokens long; raises ValueError if it is longer already."""
        more = length - len(self.tokens)
        if more < 0:
            raise ValueError(f"a prompt of {len(self.tokens)} tokens does not fit into {length}")

        def widened(array: np.ndarray, value: int) -> np.ndarray:
            widths = [(0, 0)] * (array.ndim - 1) + [(more, 0)]
            return np.pad(array, widths, constant_values=value)

        return replace(
            self,
            tokens=widened(self.tokens, pad),
            places=widened(self.places, _NO_IMAGE),
            positions=widened(self.positions, 0),
            mask=widened(self.mask, 0),
        )


class Template:
    """Qwen2-VL's chat template: the system line, the images in the order of the cameras, the instruction."""

    def __init__(self, vocabulary: Vocabulary, config: DivlaConfig, *, images: int, height: int, width: int) -> None:
        """Lay out what every prompt of a policy has in common.

        Args:
            vocabulary: Turns words into tokens.
            config: Of the policy.
            images: One or more.
            height: Of every image, in pixels.
            width: Likewise.

        Raises:
            ValueError: A size that is no multiple of a token's, or special tokens beyond the embedding.
        """
        assert images > 0, "a policy without cameras has nothing to reason about"
        special = vocabulary.special
        if vocabulary.size > config.language.vocabulary:
            raise ValueError(
                f"tokenizer.json has {vocabulary.size} tokens, the language model {config.language.vocabulary}"
            )
        self._vocabulary, self._config = vocabulary, config
        self._grid = token_grid(config.eyes, height, width)
        self._opening = _Layout()
        self._opening.add_words([special.start, *vocabulary.encode(f"system\n{config.system}"), special.end])
        self._opening.add_words([*vocabulary.encode("\n"), special.start, *vocabulary.encode("user\n")])
        for _ in range(images):
            self._opening.add_words([special.vision_start])
            self._opening.add_image(special.image, *self._grid)
            self._opening.add_words([special.vision_end])
        closing = (vocabulary.encode("\n"), [special.start], vocabulary.encode("assistant\n"))
        self._closing = [special.end, *(token for tokens in closing for token in tokens)]

    def write(self, instruction: str) -> Prompt:
        """Return the prompt of one instruction, padded to a multiple of 16 tokens.

        Raises:
            UnsuitableGoal: It is empty, or so long that with images and reasoning it overflows the context.
        """
        if not instruction.strip():
            raise UnsuitableGoal("the instruction is empty")
        words = self._vocabulary.encode(instruction)
        context, answer = self._config.language.context, self._config.reasoning_tokens
        room = context - answer - len(self._opening.tokens) - len(self._closing)
        if len(words) > room:
            raise UnsuitableGoal(
                f"the instruction has {len(words)} tokens; a context of {context} has room for {max(room, 0)} "
                f"beside images and template, and {answer} tokens of reasoning"
            )
        layout = self._opening.copy()
        layout.add_words(words + self._closing)
        prompt = layout.prompt()
        return prompt.padded(-(-len(prompt.tokens) // _MULTIPLE) * _MULTIPLE, self._vocabulary.special.pad)


def token_grid(eyes: EyesConfig, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of tokens that an image becomes; raises ValueError for parts of a token."""
    side = eyes.patch * eyes.merge
    if height % side or width % side:
        raise ValueError(f"an image of {height} x {width} pixels is not made of tokens of {side} x {side}")
    return height // side, width // side


class _Layout:
    """Tokens and their positions, from left to right."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: list[int] = []
        self._positions: list[np.ndarray] = []
        self._next = 0

    def copy(self) -> "_Layout":
        copied = _Layout()
        copied.tokens, copied._places, copied._positions = [*self.tokens], [*self._places], [*self._positions]
        copied._next = self._next
        return copied

    def add_words(self, tokens: Sequence[int]) -> None:
        """Words advance in time, height and width together."""
        self.tokens += tokens
        self._places += [_NO_IMAGE] * len(tokens)
        self._positions.append(np.tile(np.arange(len(tokens)) + self._next, (3, 1)))
        self._next += len(tokens)

    def add_image(self, token: int, rows: int, columns: int) -> None:
        """An image is one moment; the words after it begin where its longer side ends."""
        seen = 1 + max(self._places, default=_NO_IMAGE)
        self.tokens += [token] * (rows * columns)
        self._places += range(seen, seen + rows * columns)
        self._positions.append(np.indices((1, rows, columns)).reshape(3, -1) + self._next)
        self._next += max(rows, columns)

    def prompt(self) -> Prompt:
        tokens = np.array(self.tokens, dtype=np.int64)
        return Prompt(
            tokens=tokens,
            places=np.array(self._places, dtype=np.int64),
            positions=np.concatenate(self._positions, axis=1, dtype=np.int64),
            mask=np.ones_like(tokens),
            next_position=self._next,
        )
