"""DiVLA's compiled language model against transformers' own Qwen2-VL, and against upstream's numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from policy_models.divla.cache import Cache
from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig
from policy_models.divla.graphs import Hear, Read, See, Speak, language_graphs
from policy_models.divla.prompt import Prompt, Template, Vocabulary
from policy_models.divla.reason import reason
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.divla.vlm import load_weights, make_vlm
from policy_server.engine.onnx import OnnxEngine
from policy_server.export.onnx import export_graphs

HEIGHT, WIDTH, IMAGES, LENGTH, ANSWER = 56, 84, 2, 64, 10
CONFIG = DivlaConfig(
    ScaleDpConfig(1, 32, 2),
    state_width=4,
    action_width=3,
    horizon=8,
    eyes=EyesConfig(layers=2, width=32, heads=2),
    language=LanguageConfig(320, 96, 2, 4, 2, 128, rope_sections=(4, 4, 4), context=128),
    reasoning_tokens=ANSWER,
    system="Sort.",
)
pytestmark = pytest.mark.timeout(300)  # four graphs are exported
INSTRUCTIONS = ("up", "put the red block into the bin", "put it left")

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(learn_tokenizer(INSTRUCTIONS, 320))


@pytest.fixture(scope="module")
def vlm(vocabulary: Vocabulary) -> Qwen2VLForConditionalGeneration:
    """Its weights are large enough for answers that differ."""
    vlm = make_vlm(CONFIG, vocabulary.special).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in vlm.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(1.5 * drawn / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.1 * drawn + name.endswith("weight"))
    return vlm


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """(3, N, h, w, 3)."""
    shape = (len(INSTRUCTIONS), IMAGES, HEIGHT, WIDTH, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def prompts(vocabulary: Vocabulary) -> list[Prompt]:
    template = Template(vocabulary, CONFIG, images=IMAGES, height=HEIGHT, width=WIDTH)
    return [template.write(text).padded(LENGTH, vocabulary.special.pad) for text in INSTRUCTIONS]


@pytest.fixture(scope="module")
def graphs(vlm: Qwen2VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("divla")
    graphs = language_graphs(vlm, CONFIG, images=IMAGES, height=HEIGHT, width=WIDTH, length=LENGTH)
    export_graphs(graphs, _weights(vlm), folder)
    return {name: folder / f"{name}.onnx" for name in graphs}


@pytest.fixture(scope="module")
def engine(graphs: dict[str, Path]) -> OnnxEngine:
    return OnnxEngine(graphs, 1)


def _weights(vlm: Qwen2VLForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in vlm.state_dict().items() if name != "lm_head.weight"}


def _stacked(prompts: Sequence[Prompt], name: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([getattr(prompt, name) for prompt in prompts]))


def _theirs(prompts: Sequence[Prompt], images: np.ndarray, vocabulary: Vocabulary) -> Tensors:
    """The same prompts as transformers' processor hands them to its model."""
    processed = Qwen2VLImageProcessorPil()(list(images.reshape(-1, HEIGHT, WIDTH, 3)), return_tensors="pt")
    tokens = _stacked(prompts, "tokens")
    return {
        "input_ids": tokens,
        "attention_mask": _stacked(prompts, "mask"),
        "mm_token_type_ids": (tokens == vocabulary.special.image).int(),
        "pixel_values": processed["pixel_values"],
        "image_grid_thw": processed["image_grid_thw"],
    }


def _read(vlm: Qwen2VLForConditionalGeneration, prompts: Sequence[Prompt], images: np.ndarray) -> list[torch.Tensor]:
    seen = See(vlm, CONFIG.eyes, HEIGHT, WIDTH)(torch.from_numpy(images))
    tokens, places, positions, mask = (_stacked(prompts, name) for name in ("tokens", "places", "positions", "mask"))
    return Read(vlm)(tokens, places, seen, positions, mask)


@torch.no_grad()
def test_every_image_is_seen_as_transformers_sees_it_alone(
    vlm: Qwen2VLForConditionalGeneration, images: np.ndarray
) -> None:
    got = See(vlm, CONFIG.eyes, HEIGHT, WIDTH)(torch.from_numpy(images))
    assert got.shape == (3, 2 * 6, 96)
    processor = Qwen2VLImageProcessorPil()
    for i, j in np.ndindex(3, IMAGES):
        inputs = processor(images[i, j], return_tensors="pt")
        wanted = vlm.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        np.testing.assert_allclose(got[i, 6 * j : 6 * j + 6], wanted, atol=1e-4)


@torch.no_grad()
def test_reading_is_transformers_own_prefill(
    vlm: Qwen2VLForConditionalGeneration, prompts: list[Prompt], images: np.ndarray, vocabulary: Vocabulary
) -> None:
    hidden, logits, cache = _read(vlm, prompts, images)
    theirs = vlm(**_theirs(prompts, images, vocabulary), use_cache=True, output_hidden_states=True)
    real = _stacked(prompts, "mask") != 0
    np.testing.assert_allclose(hidden[real], theirs.hidden_states[-1][real], atol=1e-4)
    np.testing.assert_allclose(logits, theirs.logits[:, -1], atol=1e-4)
    for i, layer in enumerate(theirs.past_key_values.layers):
        for j, wanted in enumerate((layer.keys, layer.values)):
            at = real[:, None].expand(-1, 2, -1)
            np.testing.assert_allclose(cache[:, i, j][at], wanted[at], atol=1e-4)


@torch.no_grad()
def test_hidden_states_do_not_depend_on_padding(
    vlm: Qwen2VLForConditionalGeneration, images: np.ndarray, vocabulary: Vocabulary
) -> None:
    prompt = Template(vocabulary, CONFIG, images=IMAGES, height=HEIGHT, width=WIDTH).write("put it left")
    answers = []
    for length in (len(prompt.tokens), 80, 128):
        padded = prompt.padded(length, vocabulary.special.pad)
        hidden, logits, _ = _read(vlm, [padded], images[:1])
        answers.append((hidden[0, -prompt.length :], logits))
    for hidden, logits in answers[1:]:
        np.testing.assert_allclose(hidden, answers[0][0], atol=1e-5)
        np.testing.assert_allclose(logits, answers[0][1], atol=1e-5)


@torch.no_grad()
def test_robots_at_different_words_share_a_batch(
    vlm: Qwen2VLForConditionalGeneration, prompts: list[Prompt], images: np.ndarray
) -> None:
    _, _, cache = _read(vlm, prompts, images)
    told = ([5, 9, 11], [7], [1, 2])
    caches = [_cache(cache[i].numpy(), prompt) for i, prompt in enumerate(prompts)]
    speak = Speak(vlm)
    alone = []
    for i, prompt in enumerate(prompts):
        for k, token in enumerate(told[i][:-1]):
            _, _, entry = speak(*_speak_inputs([token], [prompt.next_position + k], [caches[i]]))
            caches[i].add(entry.numpy())
        last = prompt.next_position + len(told[i]) - 1
        alone.append(speak(*_speak_inputs([told[i][-1]], [last], [caches[i]])))
    ends = [prompt.next_position + len(words) - 1 for prompt, words in zip(prompts, told, strict=True)]
    together = speak(*_speak_inputs([words[-1] for words in told], ends, caches))
    for got, wanted in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(got, torch.cat(wanted), atol=1e-5)


def _cache(read: np.ndarray, prompt: Prompt) -> Cache:
    return Cache(read[None], prompt.mask, LENGTH + ANSWER)


def _speak_inputs(tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Cache]) -> list[torch.Tensor]:
    named = _speak_arrays(tokens, positions, caches)
    return [torch.from_numpy(array) for array in named.values()]


def _speak_arrays(tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Cache]) -> dict[str, np.ndarray]:
    return {
        "token": np.array(tokens, dtype=np.int64)[:, None],
        "position": np.tile(np.array(positions, dtype=np.int64)[:, None, None], (1, 3, 1)),
        "cache": np.concatenate([cache.entries for cache in caches]),
        "mask": np.concatenate([cache.mask for cache in caches]),
    }


@torch.no_grad()
def test_hearing_an_answer_is_having_spoken_it(
    vlm: Qwen2VLForConditionalGeneration, prompts: list[Prompt], images: np.ndarray, vocabulary: Vocabulary
) -> None:
    _, _, cache = _read(vlm, prompts, images)
    caches = [_cache(cache[i].numpy(), prompt) for i, prompt in enumerate(prompts)]
    answers = torch.tensor([[5, 9, 11, 20], [7, 8, 0, 0], [0, 3, 4, 6]])
    heard = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    positions = _stacked(prompts, "positions").amax((1, 2))[:, None] + heard.cumsum(1)
    hidden = Hear(vlm)(
        answers,
        positions[:, None].expand(-1, 3, -1),
        heard,
        torch.cat([torch.from_numpy(cache.entries) for cache in caches]),
        torch.cat([torch.from_numpy(cache.mask) for cache in caches]),
    )
    for i, prompt in enumerate(prompts):
        tokens = answers[i][heard[i] != 0]
        inputs = dict(_theirs([prompt], images[i : i + 1], vocabulary))
        inputs["input_ids"] = torch.cat((inputs["input_ids"], tokens[None]), dim=1)
        more = torch.ones_like(tokens)[None]
        inputs["attention_mask"] = torch.cat((inputs["attention_mask"], more), dim=1)
        inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], 0 * more.int()), dim=1)
        wanted = vlm(**inputs, output_hidden_states=True).hidden_states[-1][0, LENGTH:]
        np.testing.assert_allclose(hidden[i][heard[i] != 0], wanted, atol=1e-4)


def test_compiled_graphs_give_the_answers_of_transformers(
    vlm: Qwen2VLForConditionalGeneration,
    engine: OnnxEngine,
    prompts: list[Prompt],
    images: np.ndarray,
    vocabulary: Vocabulary,
) -> None:
    generated = vlm.generate(
        **_theirs(prompts, images, vocabulary), do_sample=False, max_new_tokens=ANSWER, min_new_tokens=ANSWER
    )
    wanted = generated[:, LENGTH:]
    assert len(np.unique(wanted, axis=0)) == len(prompts), "prompts that are all answered alike prove nothing"

    seen = engine.run("see", {"images": images})["tokens"]
    named = {name: _stacked(prompts, name).numpy() for name in ("tokens", "places", "positions", "mask")}
    read = engine.run("read", {**named, "images": seen})
    caches = [_cache(read["cache"][i], prompt) for i, prompt in enumerate(prompts)]
    tokens, hidden = [_best(read["logits"], vocabulary)], []
    for k in range(ANSWER - 1):
        positions = [prompt.next_position + k for prompt in prompts]
        said = engine.run("speak", _speak_arrays(tokens[-1], positions, caches))
        for cache, entry in zip(caches, said["entries"], strict=True):
            cache.add(entry[None])
        hidden.append(said["hidden"])
        tokens.append(_best(said["logits"], vocabulary))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), wanted)

    heard = engine.run(
        "hear",
        {
            "tokens": np.stack(tokens, axis=1),
            "positions": np.tile(
                np.arange(ANSWER) + np.array([[[prompt.next_position]] for prompt in prompts]), (1, 3, 1)
            ),
            "heard": np.ones((len(prompts), ANSWER), dtype=np.int64),
            "cache": np.concatenate([_cache(read["cache"][i], prompt).entries for i, prompt in enumerate(prompts)]),
            "mask": np.concatenate([_cache(read["cache"][i], prompt).mask for i, prompt in enumerate(prompts)]),
        },
    )["hidden"]
    np.testing.assert_allclose(heard[:, :-1], np.stack(hidden, axis=1), atol=1e-4)


def _best(logits: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The likeliest token that does not end the answer."""
    logits = logits.copy()
    logits[:, vocabulary.special.end] = -np.inf
    return logits.argmax(axis=1)


def test_graphs_of_one_robot_are_those_of_many(engine: OnnxEngine, prompts: list[Prompt], images: np.ndarray) -> None:
    together = engine.run("see", {"images": images})["tokens"]
    for i in range(len(images)):
        np.testing.assert_allclose(
            engine.run("see", {"images": images[i : i + 1]})["tokens"][0], together[i], atol=1e-4
        )


def test_no_weight_is_written_into_a_graph(graphs: dict[str, Path]) -> None:
    for name, path in graphs.items():
        constants = [value.const_value for value in ir.load(path).graph.initializers.values()]
        inside = [
            constant.name
            for constant in constants
            if constant is not None
            and not isinstance(constant, ir.ExternalTensor)
            and constant.dtype == ir.DataType.FLOAT
            and constant.nbytes >= 2048
        ]
        assert inside == [], name


def test_the_reference_keeps_prompt_and_answer_apart(
    vlm: Qwen2VLForConditionalGeneration, prompts: list[Prompt], images: np.ndarray, vocabulary: Vocabulary
) -> None:
    inputs, special = _theirs(prompts[:1], images[:1], vocabulary), vocabulary.special
    reasoned = reason(vlm, inputs, end=special.end, pad=special.pad, most=ANSWER)
    with torch.no_grad():
        hidden, _, _ = _read(vlm, prompts[:1], images[:1])
    np.testing.assert_allclose(reasoned.prefix, hidden[0, -prompts[0].length :], atol=1e-4)
    assert len(reasoned.reasoning) == len(reasoned.tokens) - 1

    first = int(reasoned.tokens[0])
    at_once = reason(vlm, inputs, end=first, pad=special.pad, most=ANSWER)
    assert at_once.tokens.tolist() == [first]
    assert len(at_once.reasoning) == 0


def test_weights_go_in_by_transformers_names_and_the_embedding_is_the_head(
    vlm: Qwen2VLForConditionalGeneration,
) -> None:
    weights = _weights(vlm)
    loaded = make_vlm(CONFIG)
    load_weights(loaded, weights)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert loaded.lm_head.weight.data_ptr() == weights["model.language_model.embed_tokens.weight"].data_ptr()
    load_weights(loaded, vlm.state_dict())


def test_weights_that_do_not_fit_are_refused_by_name(vlm: Qwen2VLForConditionalGeneration) -> None:
    weights, norm = _weights(vlm), "model.language_model.norm.weight"
    without = {name: tensor for name, tensor in weights.items() if name != norm}
    with pytest.raises(ValueError, match=rf"lack \['{norm}'\] and have \['other'\]"):
        load_weights(make_vlm(CONFIG), without | {"other": weights[norm]})
    with pytest.raises(ValueError, match=f"size mismatch for {norm}"):
        load_weights(make_vlm(CONFIG), weights | {norm: torch.ones(3)})
    with pytest.raises(ValueError, match="only models whose embeddings are tied"):
        load_weights(make_vlm(CONFIG), weights | {"lm_head.weight": torch.ones(320, 96)})
