"""The functions of Qwen2-VL that a policy compiles. They share every weight with it and run its own layers.

B robots may share a run, each with an instruction, padding and progress of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.vision_utils import get_vision_position_ids

from policy_models.divla.attention import Memory, grouped
from policy_models.divla.config import DivlaConfig, EyesConfig
from policy_models.divla.prompt import token_grid
from policy_models.program import Graph


class See(nn.Module):
    """The `see` graph: images of one size in, image tokens out."""

    cos: Tensor  # (patches, head width)
    sin: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, vlm: Qwen2VLForConditionalGeneration, eyes: EyesConfig, height: int, width: int) -> None:
        """Take the image tower; raises ValueError if an image of this size, in pixels, is not made of whole tokens."""
        super().__init__()
        self.visual = vlm.model.visual
        self.eyes = eyes
        self.rows, self.columns = token_grid(eyes, height, width)
        grid = torch.tensor([[1, eyes.merge * self.rows, eyes.merge * self.columns]])
        cos, sin = self.visual.rotary_pos_emb(grid, get_vision_position_ids(grid, eyes.merge))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, N, h, w, 3) uint8 RGB, each by itself, to (B, N * tokens, C)."""
        x = self._patches(images.flatten(0, 1))
        for block in self.visual.blocks:
            x = x + self._attend(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return self.visual.merger(x).unflatten(0, (-1, images.shape[1] * self.rows * self.columns))

    def _patches(self, images: Tensor) -> Tensor:
        """Embed images (I, h, w, 3) to (I, patches, width); those that merge into one token stand together."""
        merge, patch = self.eyes.merge, self.eyes.patch
        x = images.reshape(-1, self.rows, merge, patch, self.columns, merge, patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).flatten(1, 4)  # (I, patches, 3, patch, patch)
        x = (x.float() / 255 - self.mean) / self.std
        # A picture is a film of two equal frames, so the kernels of both frames add up.
        kernel = self.visual.patch_embed.proj.weight.sum(2).flatten(1)
        return F.linear(x.flatten(2).to(kernel.dtype), kernel)

    def _attend(self, attention: Any, x: Tensor) -> Tensor:
        """What transformers computes image by image, for all images at once; x is (I, patches, width)."""
        qkv = attention.qkv(x).unflatten(-1, (3, self.eyes.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = _turned(q, self.cos, self.sin), _turned(k, self.cos, self.sin)
        return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by position (Su et al. 2021, arXiv:2104.09864), in float32 whatever x is."""
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class _Language(nn.Module):
    """The language model and its two ends."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.language = grouped(vlm.model.language_model)
        self.lm_head = vlm.lm_head

    def think(self, x: Tensor, positions: Tensor, seen: Tensor, memory: Memory) -> Tensor:
        """Return the hidden states of x, after the last norm.

        Args:
            x: Embedded tokens, (B, L, C).
            positions: In time, height and width, (B, 3, L).
            seen: Whether a token sees what stood before and what is new, (B, L, K + L) bool.
            memory: What stood before, K tokens; the new ones are remembered.
        """
        hidden = torch.zeros((), dtype=x.dtype).masked_fill(~seen[:, None], torch.finfo(x.dtype).min)
        return self.language(
            inputs_embeds=x,
            position_ids=positions.transpose(0, 1),
            attention_mask={"full_attention": hidden},
            past_key_values=memory,
            use_cache=True,
            memory=memory,
        ).last_hidden_state


def _causal(mask: Tensor) -> Tensor:
    """Return which of L tokens each of them sees, (B, L, L) bool: earlier ones and itself, where the mask is not 0."""
    order = torch.arange(mask.shape[1])
    return (order[:, None] >= order)[None] & (mask != 0)[:, None]


class Read(_Language):
    """The `read` graph: a prompt in; its hidden states, the first logits of the answer and the cache out."""

    def forward(
        self, tokens: Tensor, places: Tensor, images: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read prompts of equal padded length; see `prompt.Prompt`.

        Args:
            tokens: (B, L) int64, padded on the left.
            places: Which image token stands here, -1 for words, (B, L) int64.
            images: Image tokens from `see`, (B, N * tokens, C).
            positions: In time, height and width, (B, 3, L) int64.
            mask: 0 for padding, (B, L) int64.

        Returns:
            Hidden states (B, L, C), logits (B, vocabulary), cache (B, layers, 2, kv heads, L, head width).
        """
        batch, count = images.shape[:2]
        row = places.clamp(min=0) + count * torch.arange(batch)[:, None]
        x = torch.where(places[..., None] < 0, self.language.embed_tokens(tokens), images.flatten(0, 1)[row])
        memory = Memory()
        hidden = self.think(x, positions, _causal(mask), memory)
        return hidden, self.lm_head(hidden[:, -1]), memory.entries()


class Speak(_Language):
    """The `speak` graph: one token of an answer in, the logits of the next one out."""

    def forward(self, token: Tensor, position: Tensor, cache: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance every answer by one token.

        Args:
            token: (B, 1) int64.
            position: (B, 3, 1) int64.
            cache: Of what stood before, in any order, (B, layers, 2, kv heads, K, head width).
            mask: 0 for what the cache does not hold yet, (B, K) int64.

        Returns:
            Logits (B, vocabulary), hidden state (B, C), entries for the cache (B, layers, 2, kv heads, 1, head width).
        """
        memory = Memory(cache)
        seen = torch.cat((mask, torch.ones_like(token)), dim=1)[:, None] != 0
        hidden = self.think(self.language.embed_tokens(token), position, seen, memory)[:, 0]
        return self.lm_head(hidden), hidden, memory.entries()


class Hear(_Language):
    """The `hear` graph: a whole answer in, its hidden states out."""

    def forward(self, tokens: Tensor, positions: Tensor, heard: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """Read answers that somebody else gave after prompts that were read.

        Args:
            tokens: (B, R) int64.
            positions: In time, height and width, (B, 3, R) int64.
            heard: 0 for padding, on either side, (B, R) int64.
            cache: Of the prompts, (B, layers, 2, kv heads, K, head width).
            mask: 0 for what the cache does not hold, (B, K) int64.

        Returns:
            (B, R, C).
        """
        before = (mask != 0)[:, None].expand(-1, tokens.shape[1], -1)
        seen = torch.cat((before, _causal(heard)), dim=2)
        return self.think(self.language.embed_tokens(tokens), positions, seen, Memory(cache))


def language_graphs(
    vlm: Qwen2VLForConditionalGeneration, config: DivlaConfig, *, images: int, height: int, width: int, length: int
) -> dict[str, Graph]:
    """Return `see`, `read`, `speak` and `hear` with example inputs of batch 2; prompts and caches may have any length.

    Args:
        vlm: With weights of the shape that `config` says.
        config: Of the policy.
        images: Of every robot.
        height: Of every image, in pixels.
        width: Likewise.
        length: Tokens of the prompt among the examples.
    """
    language, answer = config.language, config.reasoning_tokens
    see = See(vlm, config.eyes, height, width).eval()
    count = images * see.rows * see.columns
    words = length - count
    assert words > 0, "images leave no room for an instruction"
    entry = (2, language.layers, 2, language.kv_heads, length + answer, language.width // language.heads)
    cache, mask = torch.zeros(entry), torch.zeros(2, length + answer, dtype=torch.int64)
    mask[:, :length] = 1

    def positions(of: int) -> Tensor:
        return torch.arange(of).expand(2, 3, -1).contiguous()

    return {
        "see": Graph(see, {"images": torch.zeros(2, images, height, width, 3, dtype=torch.uint8)}, ("tokens",)),
        "read": Graph(
            Read(vlm).eval(),
            {
                "tokens": torch.zeros(2, length, dtype=torch.int64),
                "places": torch.cat((torch.arange(count), torch.full((words,), -1))).expand(2, -1).contiguous(),
                "images": torch.zeros(2, count, language.width),
                "positions": positions(length),
                "mask": torch.ones(2, length, dtype=torch.int64),
            },
            ("hidden", "logits", "cache"),
            lengths={name: {1: "prompt"} for name in ("tokens", "places", "mask")} | {"positions": {2: "prompt"}},
        ),
        "speak": Graph(
            Speak(vlm).eval(),
            {
                "token": torch.zeros(2, 1, dtype=torch.int64),
                "position": positions(1),
                "cache": cache,
                "mask": mask,
            },
            ("logits", "hidden", "entries"),
            lengths={"cache": {4: "capacity"}, "mask": {1: "capacity"}},
        ),
        "hear": Graph(
            Hear(vlm).eval(),
            {
                "tokens": torch.zeros(2, answer, dtype=torch.int64),
                "positions": positions(answer),
                "heard": torch.ones(2, answer, dtype=torch.int64),
                "cache": cache,
                "mask": mask,
            },
            ("hidden",),
            lengths={"cache": {4: "capacity"}, "mask": {1: "capacity"}},
        ),
    }
