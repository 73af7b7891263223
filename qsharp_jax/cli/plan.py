"""`qsharp plan`: memory and time of a run on a mesh of devices, without a device."""

import argparse

from qsharp_jax.cli.arguments import CONFIG_HELP, add_config, whole

SUMMARY = "memory and time on a mesh of devices, without a device"
EPILOG = f"""\
No workdir, device or weights are needed; models in folders only need their config.json, and of those on the Hugging
Face hub no safetensors are downloaded. It prints what a chip holds and does per step of the fit and of decoding on the
config's mesh, and how each number was computed. For example

  qsharp plan --config arithmetic --config.mesh=v5p_64 --ref-size llama3.1-70b --guide-size llama3.2-3b

An impossible mesh is refused, with the nearest one that works. Memory, bandwidths and peak are the vendor's numbers in
configs/meshes.py; for `single` and `cpu` give them, as --config.mesh.hbm_bytes=16000000000, and for `single` on an
accelerator its --config.mesh.platform=gpu.

{CONFIG_HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=True)
    parser.set_defaults(workdir=None)
    parser.add_argument("--ref-size", metavar="SIZE", help="a published shape as the reference, such as llama3.1-70b")
    parser.add_argument("--guide-size", metavar="SIZE", help="a published shape as the guide, such as llama3.2-3b")
    parser.add_argument(
        "--prompt-tokens", type=whole(1), metavar="N",
        help="length of the longest prompt (default: config.generate.prompt_bucket)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help='also ask the TPU compiler, for a TPU mesh (minutes); install it with: pip install ".[tpu]"',
    )  # fmt: skip


def run(workdir: None, options: argparse.Namespace) -> None:
    """Print the plan of the config; an impossible mesh is refused after what is known about it."""
    from qsharp_jax import plan
    from qsharp_jax.run import config as configs

    presets = configs.presets(options.config)
    section = options.settings.get("mesh") or presets["single"]
    job = plan.make(
        options.settings, ref_size=options.ref_size, guide_size=options.guide_size, prompt_tokens=options.prompt_tokens
    )
    try:
        for line in plan.lines(job, section, compile=options.compile):
            print(line, flush=True)
    finally:
        plan.check(job, section, presets)
