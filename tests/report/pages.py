"""Looking at a page: its outline, and scripts that a browser runs on it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, link targets and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# Ratios of WCAG 2.2 between each element's own text and what lies behind it.
CONTRASTS = """() => {
  const channels = color => color.match(/[0-9.]+/g).map(Number);
  const luminance = color => {
    const [r, g, b] = channels(color).slice(0, 3).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor, c = channels(color);
      if (c.length < 4 || c[3] > 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  for (const node of document.body.querySelectorAll('*')) {
    if (![...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    if (node.tagName === 'title') continue;
    const style = getComputedStyle(node);
    const svg = node.namespaceURI.endsWith('svg');
    const [a, b] = [luminance(svg ? style.fill : style.color), luminance(behind(node))];
    found.push([node.tagName.toLowerCase(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


# Names that reach out of their own cell, into the next one.
SPILLED_NAMES = """() => [...document.querySelectorAll('.figures .name')].filter(name =>
  name.getBoundingClientRect().right > name.closest('th').getBoundingClientRect().right
).map(name => name.textContent)"""

# Text that reaches out of the page, but for what scrolls in a box of its own.
SPILLED_TEXT = """() => [...document.querySelectorAll('main *')].filter(node =>
  [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
  && !node.closest('.scroll, pre, .hidden')
  && node.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(node => node.textContent)"""

# Neighbouring labels of an axis that print over each other.
CLASHING_TICKS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll(':scope > text.tick.x')]
    .map(tick => tick.getBoundingClientRect()).sort((a, b) => a.left - b.left);
  return boxes.slice(1).filter((box, i) => box.left < boxes[i].right).map(() => svg.outerHTML);
})"""
