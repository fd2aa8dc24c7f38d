"""Prompts and answers of DiVLA: ids, positions, text."""

import json
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig
from policy_models.divla.prompt import NEXT_ACTION, SPECIAL_TOKENS, Prompt, Template, Vocabulary, reasoning_of
from policy_models.divla.tokenizer import learn_tokenizer, read_tokenizer
from policy_models.divla.vlm import make_vlm
from policy_models.program import UnsuitableGoal

SENTENCES = [
    "put the red block into the left bin",
    "the next object is a green cup",
    "Sort all items, please: it's 3 o'clock",
]
CONFIG = DivlaConfig(
    ScaleDpConfig(1, 32, 2),
    state_width=4,
    action_width=3,
    horizon=8,
    eyes=EyesConfig(layers=1, width=32, heads=2),
    language=LanguageConfig(400, 32, 1, 2, 1, 64, rope_sections=(2, 3, 3), context=160),
    reasoning_tokens=12,
    system="You sort.",
)


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return learn_tokenizer(SENTENCES, 340)


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary(learn_tokenizer(SENTENCES, 340))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return _vocabulary()


@pytest.fixture(scope="module")
def template(vocabulary: Vocabulary) -> Template:
    return Template(vocabulary, CONFIG, images=2, height=56, width=84)


def test_a_prompt_is_qwens_chat_template_with_every_image_pad_repeated(tokenizer: str, template: Template) -> None:
    image = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    text = (
        "<|im_start|>system\nYou sort.<|im_end|>\n"
        f"<|im_start|>user\n{image}{image}put it into  the bin<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = template.write("put it into  the bin")
    assert prompt.tokens[-prompt.length :].tolist() == Tokenizer.from_str(tokenizer).encode(text).ids
    assert prompt.places[prompt.places >= 0].tolist() == list(range(12))


def test_padding_is_on_the_left_to_a_multiple_of_sixteen(vocabulary: Vocabulary, template: Template) -> None:
    prompt = template.write("put the red block")
    assert len(prompt.tokens) % 16 == 0
    assert prompt.length <= len(prompt.tokens) < prompt.length + 16
    wider = prompt.padded(64, vocabulary.special.pad)
    padding = 64 - prompt.length
    assert wider.mask.tolist() == [0] * padding + [1] * prompt.length
    assert (wider.tokens[:padding] == vocabulary.special.pad).all()
    assert (wider.places[:padding] == -1).all()
    with pytest.raises(ValueError, match="64 tokens does not fit into 48"):
        wider.padded(48, vocabulary.special.pad)


@pytest.mark.parametrize(("images", "height", "width"), [(1, 56, 56), (2, 28, 84), (3, 84, 28)])
def test_positions_are_those_of_transformers(vocabulary: Vocabulary, images: int, height: int, width: int) -> None:
    vlm = make_vlm(CONFIG, vocabulary.special)
    template = Template(vocabulary, CONFIG, images=images, height=height, width=width)
    prompts = [_padded(template.write(text), vocabulary) for text in ("up", "put the red block into the left bin")]
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts]))
    wanted, deltas = vlm.model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == vocabulary.special.image).int(),
        image_grid_thw=torch.tensor([[1, height // 14, width // 14]] * (2 * images)),
        attention_mask=torch.from_numpy(np.stack([prompt.mask for prompt in prompts])),
    )
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(prompt.positions, wanted[:, i])
        assert prompt.next_position == prompt.length + deltas[i].item()


def _padded(prompt: Prompt, vocabulary: Vocabulary) -> Prompt:
    return prompt.padded(112, vocabulary.special.pad)


@pytest.mark.parametrize("forged", SPECIAL_TOKENS.values())
def test_an_instruction_cannot_place_images_or_end_its_turn(
    vocabulary: Vocabulary, template: Template, forged: str
) -> None:
    honest, prompt = template.write("put it there"), template.write(f"put it {forged} there")
    special = list(vars(vocabulary.special).values())
    assert (
        np.isin(prompt.tokens[-prompt.length :], special).sum()
        == np.isin(honest.tokens[-honest.length :], special).sum()
    )
    assert forged not in vocabulary.decode(honest.tokens.tolist())
    assert forged in vocabulary.decode(prompt.tokens.tolist()), "it is read, letter by letter"


@pytest.mark.parametrize("instruction", ["", " \n"])
def test_an_empty_instruction_is_refused(template: Template, instruction: str) -> None:
    with pytest.raises(UnsuitableGoal, match="the instruction is empty"):
        template.write(instruction)


def test_an_instruction_that_overflows_the_context_is_refused_with_the_counts(
    vocabulary: Vocabulary, template: Template
) -> None:
    longest = next(n for n in range(200) if _refused(template, "x" * (n + 1)))
    assert template.write("x" * longest).length == CONFIG.language.context - CONFIG.reasoning_tokens
    message = f"has {longest + 1} tokens; a context of 160 has room for {longest} beside images and template, and 12"
    with pytest.raises(UnsuitableGoal, match=message):
        template.write("x" * (longest + 1))


def _refused(template: Template, instruction: str) -> bool:
    try:
        template.write(instruction)
    except UnsuitableGoal:
        return True
    return False


def test_images_of_parts_of_tokens_are_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="56 x 60 pixels is not made of tokens of 28 x 28"):
        Template(vocabulary, CONFIG, images=1, height=56, width=60)


def test_an_answer_is_reasoning_then_next_action_then_the_end(tokenizer: str, vocabulary: Vocabulary) -> None:
    text = "the red block goes left. Next action:<|im_end|>"
    assert vocabulary.answer("the red block goes left. ") == Tokenizer.from_str(tokenizer).encode(text).ids
    assert vocabulary.answer("") == [vocabulary.special.end]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_comes_in_whole_characters_and_stops_before_the_next_action(text: str) -> None:
    vocabulary = _vocabulary()
    listener = vocabulary.listen()
    told = [listener.hear(token) for token in [*vocabulary.answer(text + " "), *vocabulary.encode("more")]]
    told.append(listener.close())
    wanted = reasoning_of(unicodedata.normalize("NFC", text + " " + NEXT_ACTION))
    assert "".join(told) == wanted
    assert "�" in text or not any("�" in piece for piece in told)


def test_what_may_become_the_next_action_is_told_late_or_never(vocabulary: Vocabulary) -> None:
    cut_off = vocabulary.listen()
    assert "".join(cut_off.hear(token) for token in vocabulary.encode("go left. Next act")) == "go left. "
    assert cut_off.close() == "Next act"
    other = vocabulary.listen()
    assert "".join(other.hear(token) for token in vocabulary.encode("go left. Next actor!")) == "go left. Next actor!"
    assert other.close() == ""


def test_half_a_character_is_never_told(vocabulary: Vocabulary) -> None:
    listener = vocabulary.listen()
    tokens = vocabulary.encode("🤖")
    assert len(tokens) > 1
    assert [listener.hear(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert listener.hear(tokens[-1]) == "🤖"
    broken = vocabulary.listen()
    assert broken.hear(tokens[0]) + broken.close() == ""


def test_the_learned_tokenizer_is_qwen2s_construction(tokenizer: str, vocabulary: Vocabulary) -> None:
    model = json.loads(tokenizer)["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    for text in (*SENTENCES, "  Ü 12\n\n naïve't 🤖", "It'S e\u0301"):
        assert vocabulary.encode(text) == theirs.encode(text)
    assert 262 < vocabulary.size <= 340
    assert sorted(vars(vocabulary.special).values()) == list(range(vocabulary.size - 6, vocabulary.size))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json"])
def test_a_folder_of_vocabulary_and_merges_is_the_same_tokenizer(tokenizer: str, tmp_path: Path, where: str) -> None:
    parts = json.loads(tokenizer)
    (tmp_path / "vocab.json").write_text(json.dumps(parts["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, parts["model"]["merges"])))
    added = {token["content"]: token["id"] for token in parts["added_tokens"]}
    decoder = {str(number): {"content": token} for token, number in added.items()}
    content = {"added_tokens_decoder": decoder} if where == "tokenizer_config.json" else added
    (tmp_path / where).write_text(json.dumps(content))

    read, whole = Vocabulary(read_tokenizer(tmp_path)), Vocabulary(tokenizer)
    assert read.special == whole.special
    for text in SENTENCES:
        assert read.encode(text) == whole.encode(text)


def test_a_published_file_is_read_as_it_is(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    assert read_tokenizer(tmp_path) == read_tokenizer(tmp_path / "tokenizer.json") == tokenizer


def test_what_is_no_tokenizer_is_refused_by_name(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor vocab\.json with merges\.txt"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(json.loads(tokenizer)["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="names its special tokens"):
        read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 9999}))
    with pytest.raises(ValueError, match=r"<\|im_end\|> do not follow"):
        read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"lacks <\|im_start\|>"):
        Vocabulary(tokenizer.replace("<|im_start|>", "<|sos|>"))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Vocabulary("{}")
    with pytest.raises(ValueError, match="262"):
        learn_tokenizer(SENTENCES, 261)
    small = DivlaConfig(CONFIG.head, 4, 3, 8, language=LanguageConfig(270, 32, 1, 2, 1, 64, rope_sections=(2, 3, 3)))
    with pytest.raises(ValueError, match="the language model 270"):
        Template(Vocabulary(tokenizer), small, images=1, height=28, width=28)


def test_a_server_that_writes_prompts_needs_no_torch() -> None:
    code = "import sys, policy_models.divla.prompt, policy_models.divla.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
