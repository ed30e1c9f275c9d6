"""One latent's steering as a picture that stands alone: an SVG file, or a page around it."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from pipeline.report.axes import plan_linear
from pipeline.report.figures import Line, draw_lines

if TYPE_CHECKING:
    from pipeline.steer import Steering, TokenEffect

_WIDTH, _MARGIN = 960, 32
_TOP, _PLOT_HEIGHT, _LINE_PX, _BAR_PX = 104, 250, 17, 25
_TEXT_WIDTH = 112  # characters of a line of generated text

_STYLE = """
svg { font-family: system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
.plot, .stretch { overflow: visible; }
text { font-size: 13px; fill: #1c2126; }
text.title { font-size: 17px; font-weight: 600; }
text.head { font-weight: 600; }
text.tick, text.note { font-size: 12px; fill: #59626c; }
text.code { font: 12px ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
text.code { white-space: pre; }
text.x { text-anchor: middle; } text.y, text.end { text-anchor: end; }
.grid-line { stroke: #dfe2e5; } .mark, .zero { stroke: #aeb5bc; }
.line { fill: none; stroke: var(--c); stroke-width: 2; vector-effect: non-scaling-stroke; }
.line.d1 { stroke-dasharray: 7 4; }
.dot { fill: var(--c); } .ring { fill: #fff; stroke: var(--c); stroke-width: 2; }
.bar { fill: var(--c); opacity: .8; }
.c0 { --c: #1f67b8; } .c1 { --c: #c2500c; }
"""


def draw_steering(found: "Steering") -> Markup:
    """Effects over alpha, the associated tokens' changes, and text before and after."""
    texts = _list_texts(found)
    bottom = _TOP + 40 + max(_PLOT_HEIGHT, _BAR_PX * len(found.tokens)) + 56
    height = bottom + _LINE_PX * len(texts) + 24
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
        'role="img" aria-label="{2}"><style>{3}</style><rect width="100%" height="100%" '
        'fill="#fff"/>{4}{5}{6}{7}</svg>\n'
    ).format(
        _WIDTH,
        height,
        f"Steering with latent {found.latent} of {found.sae}",
        Markup(_STYLE),
        _draw_head(found),
        _draw_effects(found),
        _draw_tokens(found.tokens, found.alpha),
        _draw_texts(texts, bottom),
    )


def wrap_page(picture: Markup, title: str) -> Markup:
    """An HTML page that holds the picture."""
    return Markup(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>{}</title>\n{}</html>\n'
    ).format(title, picture)


def show_text(text: str) -> str:
    """Text on one line: line ends as ↵, tabs as →, what cannot be printed as ·."""
    text = text.replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() else "·" for c in text)


def _draw_head(found: "Steering") -> Markup:
    lines = (
        ("title", f"Latent {found.latent} of {found.sae} at {found.hook}"),
        ("note", f"It {found.why}; it fires on {100 * found.fires:.2g}% of tokens."),
        (
            "note",
            f"Effects: means over {found.reference}; α is in units of the activations’ mean norm, "
            f"{found.norm:.4g}.",
        ),
    )
    return _join(
        Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _MARGIN, 36 + 20 * i, text)
        for i, (kind, text) in enumerate(lines)
    )


def _draw_effects(found: "Steering") -> Markup:
    associated = [(0.0, 0.0), *((e.alpha, e.associated) for e in found.effects)]
    others = [(0.0, 0.0), *((e.alpha, e.others_absolute) for e in found.effects)]
    lines = [
        Line("associated tokens", "c0 d0", associated, "dot"),
        Line("all others, absolute", "c1 d1", others, "ring"),
    ]
    left = _MARGIN + 44
    x = plan_linear([a for line in lines for a, _ in line.points], label=_plain, zero=True)
    y = plan_linear([b for line in lines for _, b in line.points], label=_plain, zero=True)
    plot = draw_lines(lines, x=x, y=y, describe="Effects over alpha")
    keys = _join(
        Markup(
            '<path class="line {0}" d="M{1} {2}h28"/><circle class="{3} {0}" r="4.5" cx="{4}" '
            'cy="{2}"/><text x="{5}" y="{2}" dy=".32em">{6}</text>'
        ).format(line.style, at, _TOP + 22, line.marker, at + 14, at + 36, line.label)
        for line, at in zip(lines, (_MARGIN, _MARGIN + 190), strict=True)
    )
    return Markup(
        '<text class="head" x="{0}" y="{1}">Change of probability over α</text>{2}'
        '<svg x="{3}" y="{4}" width="390" height="{5}" overflow="visible">{6}</svg>'
        '<text class="note" x="{7}" y="{8}" text-anchor="middle">α, in mean norms</text>'
    ).format(
        _MARGIN,
        _TOP,
        keys,
        left,
        _TOP + 44,
        _PLOT_HEIGHT,
        plot,
        left + 195,
        _TOP + 44 + _PLOT_HEIGHT + 40,
    )


def _draw_tokens(tokens: Sequence["TokenEffect"], alpha: float) -> Markup:
    """A bar per associated token; those whose probability falls go to the left."""
    left, width = 640, 220
    low = min(0.0, *(t.change for t in tokens))
    high = max(0.0, *(t.change for t in tokens))
    scale = width / ((high - low) or 1.0)
    rows = [
        Markup(
            '<text class="code end" x="{}" y="{}" dy=".32em">{}</text>'
            '<rect class="bar c0" x="{:.1f}" y="{}" width="{:.1f}" height="14"/>'
            '<text class="note" x="{}" y="{}" dy=".32em">{}</text>'
        ).format(
            left - 10,
            _TOP + 26 + _BAR_PX * i,
            _shorten(repr(t.token)),
            left + (min(t.change, 0.0) - low) * scale,
            _TOP + 19 + _BAR_PX * i,
            abs(t.change) * scale,
            left + width + 8,
            _TOP + 26 + _BAR_PX * i,
            _signed(t.change),
        )
        for i, t in enumerate(tokens)
    ]
    head = Markup('<text class="head" x="{}" y="{}">Its tokens at α = {}</text>')
    return head.format(left - 110, _TOP, f"{alpha:g}") + _join(rows)


def _list_texts(found: "Steering") -> list[tuple[str, str]]:
    """Lines of the lower part: CSS class and text."""
    lines: list[tuple[str, str]] = []
    prompt = None
    for text in found.texts:
        if text.prompt != prompt:
            lines += [("code", ""), ("head", f"Prompt: {show_text(text.prompt)}"[:_TEXT_WIDTH])]
        prompt = text.prompt
        lines.append(("note", f"after, α = {text.alpha:g}" if text.alpha else "before"))
        wrapped = textwrap.wrap(show_text(text.text), _TEXT_WIDTH, drop_whitespace=False)
        lines += [("code", line) for line in wrapped]
    return lines


def _draw_texts(lines: Sequence[tuple[str, str]], top: int) -> Markup:
    return _join(
        Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
            kind, _MARGIN, top + _LINE_PX * i, text
        )
        for i, (kind, text) in enumerate(lines)
    )


def _shorten(text: str, most: int = 14) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _join(parts: object) -> Markup:
    return Markup("").join(parts)  # pyright: ignore[reportArgumentType]


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")
