"""How upstream turns a prompt into hidden states for the head: transformers' own greedy generation. The reference.

A server does the same with compiled graphs; see `graphs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration


@dataclass(frozen=True)
class Reasoned:
    """One answer, and what the language model thought while it read and gave it.

    Attributes:
        tokens: The answer, its last token included, (G,) int64.
        prefix: Hidden states of the prompt, (P, C).
        reasoning: Hidden states of the answer but for its last token, which is never read, (G - 1, C). Empty if the
            answer ended at once: there is no reasoning then.
    """

    tokens: Tensor
    prefix: Tensor
    reasoning: Tensor


@torch.inference_mode()
def reason(
    vlm: Qwen2VLForConditionalGeneration, inputs: Mapping[str, Tensor], *, end: int, pad: int, most: int
) -> Reasoned:
    """Answer one prompt as DexVLA's `evaluate` does.

    Args:
        vlm: Knows the token of images.
        inputs: What transformers' processor gives for one prompt: `input_ids` (1, L), `attention_mask`,
            `mm_token_type_ids`, `pixel_values`, `image_grid_thw`.
        end: The token that ends an answer.
        pad: As many leading hidden states as this token occurs, in prompt and answer, are left out.
        most: The most tokens of an answer.
    """
    length = inputs["input_ids"].shape[1]
    generate: Callable[..., Any] = vlm.generate
    generated = generate(
        **inputs,
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=end,
        pad_token_id=end,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    tokens = generated.sequences[0]
    hidden = torch.cat([step[-1][0] for step in generated.hidden_states])
    pads = int((tokens == pad).sum())
    return Reasoned(tokens[length:], hidden[pads:length], hidden[length:])
