"""Draw docs/how_it_works.svg: how the model reads a text and writes on, and what is inside a layer.

python docs/draw_how_it_works.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FIGURE = Path(__file__).with_name("how_it_works.svg")
WIDTH, HEIGHT = 960, 524
INK, GREY, BLUE, ORANGE, GREEN = "#1f2328", "#6e7781", "#ddf4ff", "#fff1e5", "#dafbe1"
SOURCE = "ROMEO:"
WRITTEN = "⏎I␣kn"  # what follows; the decoder's input is the same, one position later
STEP, BOX = 40, 32  # distance and size of the boxes with characters


def text(x: float, y: float, words: str, size: int = 14, color: str = INK, anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> list[str]:
    """A rectangle with lines of text in its middle."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{INK}"/>'
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    return [shape, *(text(x + width / 2, first + 18 * number, line) for number, line in enumerate(lines))]


def arrow(*points: tuple[float, float], color: str = INK, dashed: bool = False) -> str:
    """A line through points, with a head at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    head = "grey" if color == GREY else "ink"
    return f'<polyline points="{path}" fill="none" stroke="{color}"{dash} marker-end="url(#{head})"/>'


def marker(name: str, color: str) -> str:
    """The head of an arrow."""
    shape = f'<path d="M0,0 L8,4 L0,8 z" fill="{color}"/>'
    return f'<marker id="{name}" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{shape}</marker>'


def characters(x: float, y: float, string: str, fill: str) -> list[str]:
    """A row of characters, each in a box."""
    return [part for i, character in enumerate(string) for part in box(x + i * STEP, y, BOX, BOX, fill, character)]


def reading_and_writing() -> list[str]:
    """The encoder on the left, the decoder on the right, characters below and above."""
    left, right = 30, 340
    source_width, target_width = STEP * len(SOURCE) - (STEP - BOX), STEP * 7
    middle, mid_right = left + source_width / 2, right + target_width / 2
    parts = [text(left, 24, "Reading and writing", 17, anchor="start")]
    parts += characters(left, 420, SOURCE, BLUE) + box(left, 360, source_width, 36, "#fff", "embedding")
    parts += box(left, 250, source_width, 84, BLUE, "encoder, 1 layer:", "every character", "sees every other")
    parts += [arrow((middle, 420), (middle, 398)), arrow((middle, 360), (middle, 336))]
    for number in range(len(SOURCE)):
        parts += box(left + number * STEP + 8, 196, 16, 26, BLUE)
    parts += [arrow((middle, 250), (middle, 224)), text(middle, 184, "memory, one vector per character", 13)]
    parts += [text(middle, 472, "source: up to 64 characters", 13)]

    decoder_input = SOURCE[-1] + WRITTEN[:-1]
    parts += characters(right, 420, decoder_input, ORANGE) + box(right, 360, target_width, 36, "#fff", "embedding")
    lines = (
        "decoder, 3 layers:",
        "every position sees the memory",
        "and what was written before it,",
        "in one softmax",
    )
    parts += box(right, 190, target_width, 144, ORANGE, *lines)
    parts += box(right, 120, target_width, 44, "#fff", "head + bigram table: 66 scores")
    parts += characters(right, 62, WRITTEN, GREEN)
    inner = right + target_width / 2
    parts += [arrow((inner, 360), (inner, 336)), arrow((inner, 190), (inner, 166))]
    for number in range(len(WRITTEN)):
        x = right + number * STEP + BOX / 2
        parts += [arrow((x, 420), (x, 398)), arrow((x, 120), (x, 96))]
    parts.append(arrow((left + source_width - 6, 209), (right - 2, 209)))
    parts += [text(right + len(WRITTEN) * STEP + 4, 84, "… up to 192", 13, anchor="start")]
    parts += [text(mid_right, 472, "the last character read, then its own output", 13)]
    end = right + target_width
    back = ((end - 8, 92), (end - 8, 108), (end + 12, 108), (end + 12, 436), (end - 76, 436))
    parts.append(arrow(*back, color=GREY, dashed=True))
    parts += [
        text(left, 506, "After 192 characters the last 64 of the text become the next source.", 13, GREY, "start")
    ]
    return parts


def inside_a_layer() -> list[str]:
    """One normalisation, attention and feed-forward block side by side, one sum."""
    x, middle = 690, 805
    parts = [text(x, 24, "Inside a layer", 17, anchor="start")]
    parts += [arrow((middle, 440), (middle, 398)), text(middle, 458, "x: 192 features a position", 13)]
    parts += box(middle - 60, 360, 120, 36, "#fff", "normalize")
    parts += box(x, 220, 110, 100, ORANGE, "attention:", "3 queries, one", "key and value")
    parts += box(x + 120, 220, 110, 100, ORANGE, "feed-forward:", "1,024 wide,", "squared ReLU")
    parts += [arrow((middle, 360), (x + 55, 322)), arrow((middle, 360), (x + 175, 322))]
    parts += [arrow((x + 55, 220), (middle - 12, 156)), arrow((x + 175, 220), (middle + 12, 156))]
    parts += [f'<circle cx="{middle}" cy="146" r="14" fill="#fff" stroke="{INK}"/>', text(middle, 152, "+", 18)]
    parts += [arrow((middle, 416), (942, 416), (942, 146), (middle + 16, 146), color=GREY)]
    parts += [text(940, 134, "x itself", 13, GREY, "end"), arrow((middle, 132), (middle, 96))]
    parts += [text(middle, 86, "x for the next layer", 13)]
    return parts


def draw() -> str:
    """The whole figure as SVG."""
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>'
    divider = f'<line x1="662" y1="40" x2="662" y2="480" stroke="{GREY}" stroke-dasharray="2 4"/>'
    heads = f"<defs>{marker('ink', INK)}{marker('grey', GREY)}</defs>"
    lines = [f'{start} font-family="Helvetica, Arial, sans-serif">', heads, paper, divider]
    return "\n".join([*lines, *reading_and_writing(), *inside_a_layer(), "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
