"""docs/config.md, from the schema: `python -m qsharp_jax.run.settings_page > docs/config.md`."""

from qsharp_jax.run import schema


def page() -> str:
    """Return every setting with its default, range and meaning, as Markdown."""
    lines = [
        "# Settings",
        "",
        "A recipe changes these defaults, and `--config.KEY=VALUE` changes the recipe. The sections `task` and `model`"
        " are those of the task's file and of `DecoderConfig`.",
    ]
    for key, section in schema.sections().items():
        words = "Decoding, as in `Sampling`." if key == "generate" else type(section).__doc__
        lines += [
            "",
            f"## {key or 'The run'}",
            "",
            words,
            "",
            "| setting | default | values | meaning |",
            "|---|---|---|---|",
        ]
        for name, field in schema.settings(section).items():
            meaning, unit = field.metadata["help"], field.metadata["unit"]
            meaning = f"{meaning} ({unit})" if unit else meaning
            default = getattr(section, name)
            lines.append(
                f"| `{f'{key}.{name}'.lstrip('.')}` | `{default}` | {field.metadata['rule'].words} | {meaning} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
