"""SVG: by Graphviz in a process of its own where it is installed, else by flowc's own layered layout.

Graphviz has crashed its process on unusual labels; here it only ever sees restricted ones (`dot.label`), runs in a
child process with a time limit, and whatever goes wrong there falls back to the own layout. The own one is complete,
takes no dependency and gives the same bytes on every machine; the HTML page uses nothing else.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from xml.sax.saxutils import escape, quoteattr

from flowc.ir.core import Graph

from .dot import to_dot
from .layout import NODE_H, PILL_H, SMALL_CHAR, TITLE_CHAR, Layout, Place, lay_out
from .model import LANES, Drawing, draw

__all__ = ["COLOURS", "WAVES", "render", "to_svg"]

# Lane -> (on light, on dark). Apart in hue and in lightness, so that they stay apart without colour vision.
COLOURS: dict[str, tuple[str, str]] = {
    "llm": ("#6a55dc", "#a394ff"),
    "search": ("#0b8f7c", "#3ecfb8"),
    "embed": ("#1f7fd0", "#62b3f5"),
    "rerank": ("#a9760c", "#e2b44a"),
    "io": ("#cf4f2a", "#ff8b66"),
    "python": ("#6b7687", "#9aa6b8"),
}
# Wavefronts: one hue after the other around the wheel, light enough for dark text; they repeat after twelve.
WAVES = (
    "#7c6cf0", "#2fa4e7", "#12b3a0", "#4cb944", "#b5b62d", "#e9a23b",
    "#ef7d4f", "#e2607f", "#c65fc0", "#8f7ae5", "#5b9bd5", "#58b7a3",
)  # fmt: skip

_STYLE = """
.ink{fill:#1d2433}.dim{fill:#667085}.card{fill:#fff;stroke:#d5dae3}.box{fill:#8a94a6;fill-opacity:.06;stroke:#c3cad6}
.part{fill:none;stroke:#c3cad6;stroke-dasharray:3 3}.pill{fill:#eef1f6;stroke:#d5dae3}
.edge{fill:none;stroke:#98a2b3;stroke-width:1.3}.order{stroke-dasharray:2 4;stroke:#b6bdc9}.tip{fill:#98a2b3}
text{font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:12px}
.t{font-weight:600}.s{font-size:11px}.b{font-size:9.5px;font-weight:600;fill:#fff}
@media(prefers-color-scheme:dark){.ink{fill:#e6e9ef}.dim{fill:#98a2b3}.card{fill:#1c2230;stroke:#364055}.box{stroke:#3c475c}
.part{stroke:#3c475c}.pill{fill:#222a3a;stroke:#364055}.edge{stroke:#6b778c}.order{stroke:#4d5970}.tip{fill:#6b778c}}
"""


def to_svg(graph: Graph, *, engine: str = "auto", timeout_s: float = 20.0) -> tuple[str, str]:
    """The picture as SVG, and what laid it out: "graphviz" or "flowc".

    `engine` "auto" takes Graphviz (pygraphviz of the [viz] extra, else a `dot` on the PATH) where there is one;
    "flowc" never does.
    """
    drawing = draw(graph)
    if engine == "auto":
        found = _by_graphviz(to_dot(graph), timeout_s)
        if found is not None:
            return found, "graphviz"
    return standalone(drawing), "flowc"


_CHILD = """
import sys, pygraphviz
text = sys.stdin.buffer.read().decode()
sys.stdout.buffer.write(pygraphviz.AGraph(string=text).draw(format="svg", prog="dot"))
"""


def _by_graphviz(dot: str, timeout_s: float) -> str | None:
    """Graphviz' picture, or None if it is not installed, fails, crashes, hangs, or gives more than a plain picture."""
    commands = [[sys.executable, "-I", "-c", _CHILD]]
    if program := shutil.which("dot"):
        commands.append([program, "-Tsvg"])
    for command in commands:
        try:
            done = subprocess.run(command, input=dot.encode(), capture_output=True, timeout=timeout_s, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        text = done.stdout.decode("utf-8", "replace")
        if (
            done.returncode == 0
            and "</svg>" in text
            and not re.search(r"<script|<foreignObject|href=", text, re.IGNORECASE)
        ):
            return text
    return None


def standalone(drawing: Drawing) -> str:
    """A complete SVG file of the own layout, light or dark as the viewer is, with its legend."""
    layout = lay_out(drawing)
    lanes = [lane for lane in drawing.lanes if lane in COLOURS]
    legend_h = 30
    width, height = max(layout.width, 90.0 * len(lanes) + 20), layout.height + legend_h
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label={quoteattr("workflow " + drawing.name)}>',
        f"<title>{escape(_plain(drawing.name))}</title><desc>laid out by flowc</desc>",
        f"<style>{_STYLE}{''.join(f'.l-{lane}{{fill:{light}}}' for lane, (light, _) in COLOURS.items())}",
        "@media(prefers-color-scheme:dark){",
        "".join(f".l-{lane}{{fill:{dark}}}" for lane, (_, dark) in COLOURS.items()) + "}</style>",
    ]
    for i, lane in enumerate(lanes):
        out.append(f'<rect class="l-{lane}" x="{14 + 90 * i}" y="10" width="10" height="10" rx="2"/>')
        out.append(f'<text class="dim s" x="{29 + 90 * i}" y="19">{lane}</text>')
    out += [f'<g transform="translate({(width - layout.width) / 2:.1f} {legend_h})">', render(layout), "</g></svg>"]
    return "\n".join(out)


def render(layout: Layout, *, marker: str = "tip", interactive: bool = False) -> str:
    """The elements of a picture, to stand inside an `<svg>`. `interactive` adds what a script and a keyboard need.

    Everything is classes and presentation attributes, because the page's policy forbids inline styles.
    """
    out = [
        f'<defs><marker id="{marker}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto">'
        '<path class="tip" d="M0 .8 7.2 4 0 7.2z"/></marker></defs>'
    ]
    boxes = [p for p in layout.places if p.item.kind == "box"]
    out += [_box(p, interactive) for p in boxes]
    for f in layout.frames:
        out.append(f'<rect class="part" x="{f.x:.1f}" y="{f.y:.1f}" width="{f.w:.1f}" height="{f.h:.1f}" rx="6"/>')
        out.append(f'<text class="dim s" x="{f.x + 8:.1f}" y="{f.y + 14:.1f}">{escape(f.label)}</text>')
    for r in layout.routes:
        ends = f' data-s="{r.edge.src}" data-d="{r.edge.dst}"' if interactive else ""
        order = " order" if r.edge.kind == "order" else ""
        out.append(f'<path class="edge{order}" d="{r.path}" marker-end="url(#{marker})"{ends}/>')
    for p in layout.places:
        if p.item.kind in ("param", "result"):
            out.append(_pill(p))
        elif p.item.kind == "op":
            out.append(_node(p, interactive))
    return "\n".join(out)


def _open(p: Place, interactive: bool, extra: str) -> str:
    wave = f" w{p.item.wave % len(WAVES)}" if p.item.wave is not None else ""
    lane = p.item.lane if p.item.lane in LANES else "python"
    start = f'<g class="{extra} lane-{lane}{wave}" transform="translate({p.x:.1f} {p.y:.1f})"'
    if not interactive:
        return start + ">"
    spoken = " ".join(filter(None, (p.item.title, p.item.subtitle.replace("→", "gives"))))
    return f'{start} id="{p.item.id}" tabindex="0" role="button" aria-label={quoteattr(_plain(spoken))}>'


def _node(p: Place, interactive: bool) -> str:
    lane = p.item.lane if p.item.lane in LANES else "python"
    title, subtitle = _fit(p.item.title, p.w - 24, TITLE_CHAR), _fit(p.item.subtitle, p.w - 24, SMALL_CHAR)
    y = (17, 31) if subtitle else (24, 0)
    out = [
        _open(p, interactive, "node"),
        f'<rect class="card" width="{p.w:.1f}" height="{NODE_H:g}" rx="7"/>',
        f'<rect class="stripe l-{lane}" x="5" y="7" width="3.5" height="{NODE_H - 14:g}" rx="1.7"/>',
        f'<text class="ink t" x="16" y="{y[0]}">{escape(title)}</text>',
    ]
    if subtitle:
        out.append(f'<text class="dim s" x="16" y="{y[1]}">{escape(subtitle)}</text>')
    if p.item.wave is not None:
        out.append(_badge(p.item.wave, p.w - 13, 12, lane))
    return "".join([*out, "</g>"])


def _box(p: Place, interactive: bool) -> str:
    out = [
        _open(p, interactive, "node boxed"),
        f'<rect class="box" width="{p.w:.1f}" height="{p.h:.1f}" rx="10"/>',
        f'<text class="ink t" x="14" y="20">{escape(p.item.title)}</text>',
    ]
    if p.item.subtitle:
        at = 24 + len(p.item.title) * TITLE_CHAR
        out.append(
            f'<text class="dim s" x="{at:.1f}" y="20">{escape(_fit(p.item.subtitle, p.w - at - 20, SMALL_CHAR))}</text>'
        )
    if p.item.wave is not None:
        out.append(_badge(p.item.wave, p.w - 15, 15, "python"))
    return "".join([*out, "</g>"])


def _badge(wave: int, x: float, y: float, lane: str) -> str:
    return (
        f'<g class="badge"><circle class="l-{lane}" cx="{x:.1f}" cy="{y:.1f}" r="7.5"/>'
        f'<text class="b" text-anchor="middle" x="{x:.1f}" y="{y + 3.4:.1f}">{wave}</text></g>'
    )


def _pill(p: Place) -> str:
    text = f'<tspan class="ink t">{escape(_fit(p.item.title, p.w - 20, TITLE_CHAR))}</tspan>'
    if p.item.subtitle:
        text += f'<tspan class="dim s" dx="6">{escape(_fit(p.item.subtitle, 120, SMALL_CHAR))}</tspan>'
    return (
        f'<g class="io-pill" transform="translate({p.x:.1f} {p.y:.1f})">'
        f'<rect class="pill" width="{p.w:.1f}" height="{PILL_H:g}" rx="{PILL_H / 2:g}"/>'
        f'<text text-anchor="middle" x="{p.w / 2:.1f}" y="16">{text}</text></g>'
    )


def _fit(text: str, width: float, char: float) -> str:
    most = max(int(width / char), 1)
    text = _plain(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _plain(text: str) -> str:
    """Without characters that XML does not know, and without those that turn the direction of the text around."""
    return re.sub(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff\u200e\u200f\u202a-\u202e\u2066-\u2069]", "\ufffd", text
    )
