"""A page of responses, unguided and guided side by side, each token shaded by the guide's value of it.

It is a single HTML file with inline style and no scripts.
"""

import html
from collections.abc import Sequence

from qsharp_jax.data.tokenizer import Tokenizer
from qsharp_jax.report.examples import Examples, Kind, Pair
from qsharp_jax.report.names import NAMES
from qsharp_jax.system.chat import as_text

SHADES = 21  # from the smallest value to the largest
_ENDS = ((244, 165, 110), (247, 247, 242), (125, 190, 225))  # orange, nearly white, blue: color-blind safe
_LONG = 1500  # characters; a longer problem is folded

STYLE = """
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: #fff; color: #1a1a1a; line-height: 1.5;
       font-family: system-ui, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
p, li { max-width: 60rem; }
.problem { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f0; padding: .6rem .8rem;
           border-radius: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem;
        margin-top: .8rem; }
.side { border: 1px solid #ccc; border-radius: 6px; padding: .6rem .8rem; min-width: 0; }
.side h3 { font-size: 1rem; margin: 0 0 .2rem; }
.right { color: #14633a; font-weight: 600; } .wrong { color: #a02418; font-weight: 600; }
.facts { font-size: .85rem; color: #444; margin-bottom: .5rem; overflow-wrap: anywhere; }
.response { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9;
            font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .92rem; }
.t { position: relative; padding: .12em 0; box-shadow: inset -1px 0 0 rgba(255, 255, 255, .9); }
.none { border-bottom: 1px dotted #888; }
.t:hover { outline: 1px solid #1a1a1a; }
.t:hover::after { content: attr(data-v); position: absolute; left: 0; top: 1.6em; z-index: 1; background: #1a1a1a;
                  color: #fff; padding: 0 .4em; border-radius: 3px; font-size: .8rem; white-space: nowrap; }
.mark { font-style: normal; color: #666; font-size: .8em; }
.legend { position: sticky; top: 0; z-index: 2; background: #fff; padding: .3rem 0; margin: .8rem 0; font-size: .9rem;
          display: flex; align-items: center; gap: .6rem; flex-wrap: wrap; }
.bar { width: 14rem; height: 1.1rem; border: 1px solid #999; border-radius: 3px; }
"""


def make(task: str, examples: Examples, scored: Sequence[dict] | None, tokenizer: Tokenizer) -> str:
    """Return the page's HTML.

    Args:
      task: its name.
      scored: the guide's "values" of pi_ref's samples; None without a guide, and then nothing is shaded.
    """
    kinds = examples.by_kind()
    chosen = [(kind, pair) for kind, pairs in kinds.items() for pair in pairs[: kind.shown]]
    unguided = [scored[pair.place]["values"] if scored else None for _, pair in chosen]
    guided = [pair.after.get("values") for _, pair in chosen]
    values = [value for side in (*unguided, *guided) for value in side or () if value is not None]
    scale = min([0.0, *values]), max([1.0, *values])
    name = f"{NAMES[examples.method]}, eta {examples.eta:g}"
    title = f"{task}: pi_ref and {name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _introduction(kinds, name),
        _legend(scale) if values else "<p>There are no values of a guide to show.</p>",
    ]
    for number, ((kind, pair), before, after) in enumerate(zip(chosen, unguided, guided, strict=True), start=1):
        words, answer = _words(kind, name), html.escape(pair.before["answer"])
        answer = f"; the answer is {answer}" if answer else ""
        parts.append(
            f"<h2>{number}. {words[0].upper()}{words[1:]}{answer}</h2>\n"
            f'{_problem(as_text(pair.before["prompt"]))}\n<div class="pair">\n'
            f"{_side('pi_ref', pair.before, examples, before, scale, tokenizer)}\n"
            f"{_side(name, pair.after, examples, after, scale, tokenizer)}\n</div>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{_shades()}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _introduction(kinds: dict[Kind, list[Pair]], name: str) -> str:
    counts = ", ".join(
        f"{len(pairs)} where {_words(kind, name)} ({min(len(pairs), kind.shown)} shown)"
        for kind, pairs in kinds.items()
    )
    return (
        f"<p>Held-out problems, answered by pi_ref alone and by {html.escape(name)}: the first sample of each method,"
        f" {sum(map(len, kinds.values()))} problems in all, {counts}. KL is that of the response to pi_ref, in nats,"
        " before truncation.</p>"
    )


def _words(kind: Kind, name: str) -> str:
    return html.escape(kind.words.format(learned=name.partition(",")[0]))


def _legend(scale: tuple[float, float]) -> str:
    return (
        "<p>A token's shade is the guide's value of it: the reward expected if pi_ref continues from that token. Point"
        " at a token to read the value.</p>\n"
        f'<div class="legend"><span>value {scale[0]:g}</span><span class="bar" style="background: linear-gradient('
        f'to right, {", ".join(map(_rgb, _ENDS))})"></span><span>{scale[1]:g}</span>'
        '<span><span class="t none">dotted</span>: no value, the token was not a candidate</span></div>'
    )


def _problem(prompt: str) -> str:
    shown = f'<div class="problem">{html.escape(prompt)}</div>'
    if len(prompt) <= _LONG:
        return shown
    return f"<details><summary>The problem ({len(prompt)} characters)</summary>{shown}</details>"


def _side(
    name: str,
    sample: dict,
    examples: Examples,
    values: Sequence[float | None] | None,
    scale: tuple[float, float],
    tokenizer: Tokenizer,
) -> str:
    verdict = f' <span class="{examples.verdict(sample)}">{examples.verdict(sample)}</span>'
    answer = "no answer" if sample["parsed"] is None else f"answer {sample['parsed']}"
    facts = [
        f"reward {sample['reward']:g}",
        *([answer] if sample["answer"] else []),  # of a task with answers
        f"{len(sample['tokens'])} tokens" + ("" if sample["finished"] else ", cut off"),
        f"KL {sample['kl']:.2f}",
    ]
    known = [value for value in values or () if value is not None]
    if known:
        facts.append(f"value {known[0]:.2f} at first, {known[-1]:.2f} at last")
    return (
        f'<div class="side"><h3>{html.escape(name)}{verdict if examples.right_or_wrong else ""}</h3>'
        f'<div class="facts">{html.escape("; ".join(facts))}</div>'
        f'<div class="response">{_tokens(sample["tokens"], values, scale, tokenizer)}</div></div>'
    )


def _tokens(
    tokens: Sequence[int], values: Sequence[float | None] | None, scale: tuple[float, float], tokenizer: Tokenizer
) -> str:
    """Return a response with one span per token; bytes of an unfinished character go to the token that completes it."""
    *pieces, rest = tokenizer.decode_stream([token] for token in tokens)  # bytes of an unfinished character are "rest"
    pieces[-1] += rest
    spans = []
    for place, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        shown = html.escape(piece).replace("\n", '<i class="mark">\u21b5</i>\n')
        if token in tokenizer.stop_ids:
            shown += '<i class="mark">end</i>'
        if values is None:
            spans.append(shown)
            continue
        value = values[place]
        kind = "none" if value is None else f"v{_shade(value, scale)}"
        words = "no value" if value is None else f"{value:.3f}"
        spans.append(f'<span class="t {kind}" data-v="{words}">{shown}</span>')
    return "".join(spans)


def _shade(value: float, scale: tuple[float, float]) -> int:
    low, high = scale
    return round((value - low) / (high - low) * (SHADES - 1))


def _shades() -> str:
    return "".join(f".v{number} {{ background: {_color(number / (SHADES - 1))}; }}\n" for number in range(SHADES))


def _color(share: float) -> str:
    """Return the color of a value between the smallest, 0, and the largest, 1."""
    low, middle, high = _ENDS
    ends, part = ((low, middle), share * 2) if share < 0.5 else ((middle, high), share * 2 - 1)
    return _rgb(tuple(round(a + (b - a) * part) for a, b in zip(*ends, strict=True)))


def _rgb(color: Sequence[int]) -> str:
    return f"rgb({', '.join(map(str, color))})"
