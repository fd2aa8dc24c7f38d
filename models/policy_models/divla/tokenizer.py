"""Qwen2's byte-level BPE tokenizer: learned from a few sentences, or read from a published folder.

Its vocabulary is all bytes, one token per merge, and last the special tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from policy_models.divla.prompt import SPECIAL_TOKENS

# How Qwen2 cuts text before any merge.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = 256


def learn_tokenizer(sentences: Iterable[str], size: int) -> str:
    """Return the text of a `tokenizer.json` of at most `size` tokens, learned from sentences.

    Raises:
        ValueError: `size` has no room for every byte and the special tokens.
    """
    least = _BYTES + len(SPECIAL_TOKENS)
    if size < least:
        raise ValueError(f"{size} tokens are too few: bytes and special tokens are {least}")
    tokenizer = _without_special_tokens(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    return tokenizer.to_str()


def read_tokenizer(path: Path) -> str:
    """Return the text of the `tokenizer.json` of a published policy or language model.

    Args:
        path: A `tokenizer.json`, or a folder with one, or with `vocab.json` and `merges.txt` and, for the special
            tokens, `tokenizer_config.json` or `added_tokens.json`.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.exists():
            text = file.read_text(encoding="utf-8")
            Tokenizer.from_str(text)
            return text
        if not (path / "vocab.json").exists() or not (path / "merges.txt").exists():
            raise ValueError("it has neither tokenizer.json nor vocab.json with merges.txt")
        return _from_parts(path)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error


def _from_parts(folder: Path) -> str:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [
        (left, right) for left, _, right in (line.partition(" ") for line in lines) if right and left != "#version:"
    ]
    tokenizer = _without_special_tokens(models.BPE(vocab=vocabulary, merges=merges))
    added = _added_tokens(folder)
    # The library numbers added tokens from the end of the vocabulary on, in the order in which they are added.
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in sorted(added, key=added.__getitem__)])
    moved = [token for token, number in added.items() if tokenizer.token_to_id(token) != number]
    if moved:
        raise ValueError(f"the ids of {', '.join(moved)} do not follow those of vocab.json")
    return tokenizer.to_str()


def _added_tokens(folder: Path) -> Mapping[str, int]:
    config, plain = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.exists():
        added: Mapping[str, Any] = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        if added:
            return {token["content"]: int(number) for number, token in added.items()}
    if plain.exists():
        return json.loads(plain.read_text(encoding="utf-8"))
    raise ValueError("neither tokenizer_config.json nor added_tokens.json names its special tokens")


def _without_special_tokens(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    cut: Sequence[Any] = (
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(cut))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
