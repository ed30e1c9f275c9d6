"""Markers of the report's figures, each with a shape of its own, for colour is not enough."""

from markupsafe import Markup

SHAPES = {  # outlines around (0, 0), of about a dot's area; "open-<shape>" is only its edge
    "square": "M-4 -4H4V4H-4Z",
    "diamond": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "triangle": "M0 -5.2L5.2 4H-5.2Z",
    "cross": "M-4 -4L4 4M4 -4L-4 4",
}
MARKERS = ("dot", "square", "diamond", "triangle", "cross")


def draw_key(style: str, marker: str, *, joined: bool = True) -> Markup:
    """The sample of a series in a chart's key."""
    path = Markup('<path class="line {}" d="M1 8H27"/>').format(style) if joined else Markup("")
    return Markup('<svg class="swatch tall" aria-hidden="true">{}{}</svg>').format(
        path, draw_marker(marker, style, "14", "8") if marker else ""
    )


def draw_marker(marker: str, style: str, x: str, y: str, title: str = "") -> Markup:
    """A marker at (x, y), which are SVG lengths; see Line for its names."""
    if marker in ("dot", "ring"):
        shape = Markup('<circle class="{} {}" r="4.5" cx="{}" cy="{}">{}</circle>')
        return shape.format(marker, style, x, y, draw_title(title))
    name = marker.removeprefix("open-")
    kind = "stroke" if name == "cross" else "dot" if name == marker else "ring"
    return Markup(
        '<svg class="at" x="{}" y="{}"><path class="{} {}" d="{}">{}</path></svg>'
    ).format(x, y, kind, style, SHAPES[name], draw_title(title))


def draw_title(text: str) -> Markup:
    """What the browser shows when the pointer rests on a mark."""
    return Markup("<title>{}</title>").format(text) if text else Markup("")
