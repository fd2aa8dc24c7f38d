"""The yardstick of DiVLA bundles: transformers' own language model, fusion, head and sampler, in eager torch."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.divla_contenders import Said
from benchmarks.eager import own_weights
from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.divla.config import DivlaConfig
from policy_models.divla.denoiser import Denoiser, make_head
from policy_models.divla.fusion import Fusion
from policy_models.divla.prompt import Template, Vocabulary, token_grid
from policy_models.divla.vlm import load_weights, make_vlm
from policy_models.program import Tensors
from policy_models.spec import Observation, Reasoning
from policy_server.bundle import Bundle

_FRAMES = 2  # a picture is a film of two equal frames


class EagerDivla:
    """What a policy's author would run: `generate` once, its hidden states to the head, no numpy between the steps."""

    engine = "eager torch"

    def __init__(self, bundle: Bundle, threads: int, *, in_bfloat16: bool = False) -> None:
        """Build the networks, in float32 unless they are to be in bfloat16."""
        assert bundle.manifest.family == "divla" and bundle.assets.tokenizer and bundle.assets.normalizer
        assert bundle.spec.sampler and bundle.spec.reasoning
        self.precision = "bf16" if in_bfloat16 else "f32"
        self._type = torch.bfloat16 if in_bfloat16 else torch.float32
        self._threads = threads
        self._config: DivlaConfig = bundle.config
        self._spec, self._sampler = bundle.spec, bundle.spec.sampler
        self._most = min(self._config.reasoning_tokens, bundle.spec.reasoning.tokens)
        self._normalizer = bundle.assets.normalizer
        self._vocabulary = Vocabulary(bundle.assets.tokenizer)
        camera = bundle.spec.cameras[0]
        self._template = Template(
            self._vocabulary,
            self._config,
            images=len(bundle.spec.cameras),
            height=camera.height,
            width=camera.width,
        )
        self._rows, self._columns = token_grid(self._config.eyes, camera.height, camera.width)

        weights = own_weights(bundle.weights)
        self._vlm: Any = make_vlm(self._config, self._vocabulary.special)
        load_weights(self._vlm, _part(weights, "vlm"))
        self._vlm.set_attn_implementation("sdpa")  # transformers' own default, and faster than its "eager"
        self._fusion, head = Fusion(self._config.language.width), make_head(self._config)
        self._fusion.load_state_dict(_part(weights, "fusion"), assign=True)
        head.load_state_dict(_part(weights, "head"), assign=True)
        self._denoiser = Denoiser(_Rounded(head, self._type)).eval()
        networks: tuple[nn.Module, ...] = (self._vlm, self._fusion, head)
        for network in networks:
            network.to(self._type).eval()

    def prepare(self) -> None:
        """Take the process's threads."""
        torch.set_num_threads(self._threads)

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """See `DivlaContender.chunk`."""
        return self.act(observation, self.reason(observation).reasoning, seed, again=False)

    @torch.inference_mode()
    def denoise(self, inputs: Tensors) -> np.ndarray:
        """See `DivlaContender.denoise`."""
        denoised: np.ndarray = self._denoiser(
            *(torch.from_numpy(inputs[name]) for name in ("noisy", "sigma", "context", "state"))
        ).numpy()
        return denoised

    @torch.inference_mode()
    def sample(self, observation: Observation, context: np.ndarray, seed: int) -> np.ndarray:
        """See `DivlaContender.sample`."""
        assert observation.state is not None, "drawn observations have a state"
        told = torch.from_numpy(context)
        state = torch.from_numpy(self._normalizer.normalize_state(observation.state))[None]
        spec, rng = self._sampler, np.random.default_rng(seed)
        sigmas = SCHEDULES[spec.schedule](spec.steps, NoiseLevels(spec.sigma_min, spec.sigma_max, spec.rho))

        def noise() -> Tensor:
            shape = (1, self._config.horizon, self._config.action_width)
            return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

        def denoise(x: Tensor, sigma: float) -> Any:
            return self._denoiser(x, torch.full((1,), sigma), told, state)

        x = run(SAMPLERS[spec.sampler](noise() * (1 + sigmas[0] ** 2) ** 0.5, sigmas, noise), denoise)
        return self._normalizer.denormalize_action(x[0].clamp(-1, 1).numpy())

    @torch.inference_mode()
    def reason(self, observation: Observation) -> Said:
        """Generate greedily, as upstream's evaluation does, and keep what the head is told."""
        began_s = time.perf_counter()
        prompt = self._template.write(str(observation.goal))
        tokens = torch.from_numpy(prompt.tokens[prompt.mask == 1])[None]
        clock = _Clock()
        generated = self._vlm.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == self._vocabulary.special.image).int(),
            do_sample=False,
            max_new_tokens=self._most,
            eos_token_id=self._vocabulary.special.end,
            pad_token_id=self._vocabulary.special.end,
            output_hidden_states=True,
            return_dict_in_generate=True,
            streamer=clock,
            **self._pixels(observation),
        )
        length = tokens.shape[1]
        hidden = torch.cat([step[-1][0] for step in generated.hidden_states])[None]
        prefix = torch.arange(hidden.shape[1])[None] < length
        context = self._fusion(hidden, prefix, ~prefix).float().numpy()
        text = self._text(generated.sequences[0, length:].tolist())
        reasoning = Reasoning(text, None, "tokens", observation, {"context": context})
        first_at_s, last_at_s = clock.at_s[1], clock.at_s[-1]  # the prompt comes before
        whole_ms = 1e3 * (time.perf_counter() - began_s)
        return Said(reasoning, len(clock.at_s) - 2, 1e3 * (last_at_s - first_at_s), whole_ms)

    def act(self, observation: Observation, reasoning: Reasoning, seed: int, *, again: bool) -> np.ndarray:
        """See `DivlaContender.act`; there is one way alone."""
        assert not again, "whoever generates has read"
        return self.sample(observation, reasoning.seen["context"], seed)

    def _text(self, tokens: list[int]) -> str:
        listener = self._vocabulary.listen()
        return ("".join(map(listener.hear, tokens)) + listener.close()).strip()

    def _pixels(self, observation: Observation) -> Mapping[str, Tensor]:
        """Return what transformers' processor makes of images of whole tokens."""
        eyes = self._config.eyes
        images = torch.from_numpy(np.stack([observation.images[camera.name] for camera in self._spec.cameras]))
        x = (images.float() / 255 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
        x = x.reshape(-1, self._rows, eyes.merge, eyes.patch, self._columns, eyes.merge, eyes.patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, _FRAMES, -1, -1)
        grid = torch.tensor([[1, eyes.merge * self._rows, eyes.merge * self._columns]])
        return {
            "pixel_values": x.flatten(5).flatten(0, 4).to(self._type),
            "image_grid_thw": grid.expand(len(images), -1),
        }


class _Rounded(nn.Module):
    """A head that computes in a type of its own, between noise levels and actions in float32."""

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = head
        self.dtype = dtype

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor, state: Tensor) -> Tensor:
        """Predict the noise; see `ScaleDp.forward`."""
        eps: Tensor = self.head(noisy.to(self.dtype), timestep, condition.to(self.dtype), state.to(self.dtype))
        return eps.float()


class _Clock:
    """A streamer of transformers that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by transformers."""
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        """Called by transformers."""


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
