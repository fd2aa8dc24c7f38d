"""CLIP's byte-pair tokenizer, from its published merges or from merges learned on a few instructions.

The vocabulary is CLIP's construction: every byte, every byte at the end of a word, one token per merge, and last the
start and end of the text.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

Merges = Sequence[tuple[str, str]]

_CLIP_MERGES = 49152 - 256 - 2
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(merges: Merges) -> str:
    """Return the text of a `tokenizer.json`."""
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=list(merges))  # type: ignore[arg-type]  # pairs, it says strings
    return str(tokenizer.backend_tokenizer.to_str())


def read_merges(path: Path) -> Merges:
    """Read CLIP's merges.

    Args:
        path: `bpe_simple_vocab_16e6.txt.gz` as OpenAI published it (the packages `clip` and `open_clip_torch` contain
            it), or the `merges.txt` of a CLIP folder on the Hugging Face hub.

    Raises:
        ValueError: It is neither.
    """
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CLIP's vocabulary: {error}") from error
    lines = text.split("\n")[1 : 1 + _CLIP_MERGES]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
    if len(merges) != _CLIP_MERGES:
        raise ValueError(f"{path} holds {len(merges)} merges, CLIP's vocabulary has {_CLIP_MERGES}")
    return merges


def learn_merges(texts: Iterable[str], count: int) -> Merges:
    """Learn at most `count` merges from `texts`."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + count,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.lower() for text in texts], trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in learned[:count]]


def _byte_letters() -> list[str]:
    """Return the printable letter of every byte, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
