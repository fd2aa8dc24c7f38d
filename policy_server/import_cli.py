"""The command line of `policy-server import`: one command per family of published checkpoints."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from policy_server.console import log, or_explain

imports = typer.Typer(no_args_is_help=True, help="Make a bundle of a published checkpoint.")


Gradients = Annotated[
    bool,
    typer.Option(
        help="Export the denoiser's gradient too, by which real-time chunking lets the free actions of a chunk know of "
        "the settled ones. Takes about as long again."
    ),
]


@imports.command("beso")
def import_beso(
    checkpoint: Annotated[Path, typer.Argument(help="model_state_dict.pth, or the same as .safetensors.")],
    stats: Annotated[
        Path,
        typer.Option(
            help="JSON with 'state' and 'action', each with lists mean, std, min, max over the training data."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    config: Annotated[
        Path | None,
        typer.Option(help="The run's .hydra/config.yaml; looked for beside the checkpoint unless named."),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(help="Noise schedule. Upstream trains with exponential; its evaluate_*.yaml say linear."),
    ] = "exponential",
    step_s: Annotated[float, typer.Option(min=1e-4, help="Time between two actions of the robot.")] = 0.1,
    zero_goal: Annotated[
        str, typer.Option(help="Goal dimensions that are zeroed after scaling, such as 2,5,6,7,8,9 for block push.")
    ] = "",
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")] = "MIT",
    gradients: Gradients = True,
) -> None:
    """Make a bundle of a public BESO checkpoint.

    BESO stores no scaler, so the statistics of its training data must come with it.

    Example: policy-server import beso c_beso_1/model_state_dict.pth --stats push.json --zero-goal 2,5,6,7,8,9 -o push
    """
    from policy_server.export.beso import import_checkpoint

    log(verbose=False)
    try:
        dims = tuple(int(dim) for dim in zero_goal.split(",") if dim.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{zero_goal!r}, expected numbers such as 2,5,6") from error
    bundle = or_explain(
        import_checkpoint,
        checkpoint,
        statistics=stats,
        hydra_config=config or checkpoint.parent / ".hydra" / "config.yaml",
        output=output,
        schedule=schedule,
        step_s=step_s,
        zeroed_goal_dims=dims,
        licence=licence,
        gradients=gradients,
    )
    typer.echo(f"{output} holds {bundle.name!r}; try: policy-server check {output}")


@imports.command("mode")
def import_mode(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="model_cleaned.safetensors or .pt, the folder that holds it, or the .ckpt of a training run, of which "
            "the averaged weights are taken."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle; its name is the policy's.")],
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="CLIP's vocabulary, for instructions: bpe_simple_vocab_16e6.txt.gz (in the packages clip and "
            "open_clip_torch, and in MoDE's own repository), or the merges.txt of a CLIP on the Hugging Face hub.",
            show_default=False,
        ),
    ] = None,
    benchmark: Annotated[
        str,
        typer.Option(
            help="What it was trained on, for cameras and step_s: calvin (rgb_static and rgb_gripper at 224x224, "
            "30 Hz) or libero (static at 224x224, wrist at 112x112, 20 Hz)."
        ),
    ] = "calvin",
    camera: Annotated[
        list[str] | None,
        typer.Option(
            help="A camera as name:WIDTHxHEIGHT; given twice, the static one first, instead of the benchmark's. Images "
            "of another size are resized linearly, or as name:WIDTHxHEIGHT:area says.",
            show_default=False,
        ),
    ] = None,
    goal: Annotated[
        Literal["text", "image"],
        typer.Option(
            help="text: instructions. image: a picture of the goal, through CLIP's image tower; the released policies "
            "were trained on instructions alone, so measure before you rely on it."
        ),
    ] = "text",
    steps: Annotated[
        int,
        typer.Option(min=1, help="Denoising steps. 10 in the paper; upstream's evaluation on CALVIN says 5."),
    ] = 10,
    sigma_min: Annotated[
        float,
        typer.Option(help="Lowest noise level. 0.001 in the paper; upstream's evaluation on CALVIN says 1.0."),
    ] = 0.001,
    step_s: Annotated[
        float | None,
        typer.Option(min=1e-4, help="Time between two actions, instead of the benchmark's.", show_default=False),
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Experts that serve a noise level; a shared expert is one of them.")
    ] = 2,
    noise_token: Annotated[
        bool, typer.Option(help="Whether it was trained with the noise level as a token (use_noise_token_as_input).")
    ] = True,
    goal_routing: Annotated[
        bool, typer.Option(help="Whether it was trained with the goal in its routers (use_goal_in_routing).")
    ] = False,
    sigma_data: Annotated[float, typer.Option(min=1e-6, help="Of the preconditioning.")] = 0.5,
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")] = "MIT",
    gradients: Gradients = True,
) -> None:
    """Make a bundle of a public MoDE checkpoint.

    Layers, widths, heads, experts, chunk length, image encoders and CLIP are read from the file. What it cannot tell
    has the paper's value unless an option says otherwise; training runs state theirs in .hydra/config.yaml. A released
    policy takes two minutes, and 7 GB of memory.

    Example: policy-server import mode MoDE_CALVIN_ABC_1 --vocabulary bpe_simple_vocab_16e6.txt.gz -o mode-calvin
    """
    from policy_server.export.mode import import_checkpoint

    log(verbose=False)
    bundle = or_explain(
        import_checkpoint,
        checkpoint,
        output=output,
        vocabulary=vocabulary,
        benchmark=benchmark,
        cameras=camera or (),
        goal=goal,
        steps=steps,
        sigma_min=sigma_min,
        step_s=step_s,
        top_k=top_k,
        noise_token=noise_token,
        goal_routing=goal_routing,
        sigma_data=sigma_data,
        licence=licence,
        gradients=gradients,
    )
    typer.echo(f"{output} holds {bundle.name!r}; try: policy-server check {output}")


@imports.command("divla")
def import_divla(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Folder of a full fine-tune (safetensors) or a LoRA fine-tune (adapter and non_lora_trainables.bin), "
            "with config.json and dataset_stats.json or .npz in it or one folder above."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle; its name is the policy's.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="What a LoRA fine-tune adds to: the folder of a Qwen2-VL or of an earlier policy. Not needed where "
            "non_lora_trainables.bin has all weights.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, or a folder with it or with vocab.json and merges.txt; looked for with the "
            "checkpoint, above it and with the base unless named.",
            show_default=False,
        ),
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(
            help="A camera as name:WIDTHxHEIGHT, once for each, in the order of training, all of one size in multiples "
            "of 28. Unless given: top, left_wrist and right_wrist at 308x252, which upstream's training makes of its "
            "320x240. Images of another size are resized by area, or as name:WIDTHxHEIGHT:linear says, in one step.",
            show_default=False,
        ),
    ] = None,
    crop: Annotated[
        float,
        typer.Option(
            help="Fraction of each side around the centre of an image that is kept before resizing: 0.95 in upstream's "
            "evaluation, for policies trained with its augmentation; 1 for others."
        ),
    ] = 0.95,
    state: Annotated[
        str,
        typer.Option(
            help="What the robot's state holds, as name:unit,name:unit,... with units left out where there are none. "
            "Unless given, 14 numbers are ALOHA's: six joints and the gripper of the left arm, then of the right."
        ),
    ] = "",
    action: Annotated[str, typer.Option(help="What an action holds, likewise.")] = "",
    step_s: Annotated[float, typer.Option(min=1e-4, help="Time between two actions; ALOHA's is 0.02.")] = 0.02,
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="One that it was trained to follow, as an example; may be repeated.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 10,
    reasoning_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one reasoning.")] = 256,
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")] = "Apache-2.0",
    gradients: Gradients = True,
) -> None:
    """Make a bundle of a DiVLA or DexVLA fine-tune, as upstream's training leaves it.

    The shape of everything is read from config.json, and how states and actions are scaled from the statistics. What
    no file tells, cameras, names and time, is ALOHA's unless an option says otherwise.

    Example: policy-server import divla sorting/checkpoint-60000 --base Qwen2-VL-2B-Instruct -o sorting
    """
    from policy_server.export.divla import CAMERAS, import_checkpoint

    log(verbose=False)
    bundle = or_explain(
        import_checkpoint,
        checkpoint,
        output=output,
        base=base,
        tokenizer=tokenizer,
        cameras=camera or CAMERAS,
        crop=crop,
        state=_listed(state),
        action=_listed(action),
        step_s=step_s,
        instructions=instruction or (),
        steps=steps,
        reasoning_tokens=reasoning_tokens,
        licence=licence,
        gradients=gradients,
    )
    typer.echo(f"{output} holds {bundle.name!r}; try: policy-server check {output}")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
