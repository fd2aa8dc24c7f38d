"""A DiVLA policy that reasons and acts: its head, its language model, and how little one waits for the other.

All weights are random, and four things are measured. The heads of released size, ScaleDP-L and the UNet: a denoising
step, and a chunk of all steps, told noise. The language model of a smaller policy, since the released one has two
billion weights: a token of a reasoning, and the way from the images to the first action, which is to look, read,
reason, inject and denoise; what was read for the reasoning is kept for the chunk about the same images, and the table
has what it costs to read it twice. Robots that act at a rate while their server reasons without a pause, in 8, 32 and
128 tokens: whoever acts goes first between any two tokens, so the length of a reasoning must not show in their
latencies; but a policy that thinks takes all the processor time that is left, and the robots are a process on the same
machine. And several robots' tokens and steps in one run, against one at a time.

The yardstick is eager torch: transformers' own greedy `generate` with its hidden states and scaled dot product
attention, fusion, head and sampler, all in one process without a server; `bf16` is the same in bfloat16. Contenders
have as many threads as there are cores and a process each (those of eager torch share one), take turns round by round
in random order, and in float32 must first say the same words and give the same step. A policy whose words are drawn
never ends by itself, so every reasoning has its most tokens. Intervals are a bootstrap over the rounds.
"""

from benchmarks import divla_acting, divla_batches, divla_heads, divla_words
from benchmarks.divla_acting import measure_acting
from benchmarks.divla_batches import measure_batches
from benchmarks.divla_bundles import divla_policies
from benchmarks.divla_contenders import THREADS
from benchmarks.divla_heads import measure_head
from benchmarks.divla_part import COLUMNS, join
from benchmarks.divla_words import measure_words
from benchmarks.machine import describe_machine
from benchmarks.result import Result
from benchmarks.settings import Settings


def run(settings: Settings, command: str) -> Result:
    """Measure part by part."""
    machine = describe_machine()
    policies = divla_policies(settings, divla_acting.TOKENS[-1])
    whole = join(
        [
            *(
                measure_head(label, bundle, settings.rounds(divla_heads.ROUNDS))
                for label, bundle in policies.heads.items()
            ),
            measure_words(policies.talking, settings.rounds(divla_words.ROUNDS)),
            measure_acting(
                policies.acting,
                settings.rounds(divla_acting.ROUNDS),
                divla_acting.QUICK_S if settings.quick else divla_acting.ROUND_S,
            ),
            measure_batches(policies.talking, settings.rounds(divla_batches.ROUNDS)),
        ]
    )
    return Result(
        name="divla",
        machine=machine,
        command=command,
        columns=COLUMNS,
        rows=whole.rows,
        series=whole.series,
        bars=whole.bars,
        facts={"threads": f"{THREADS} for each contender", **whole.facts},
    )
