"""The frame of every report: one HTML file with its style and hover script inside, light and dark, nothing fetched.

A Content-Security-Policy forbids the browser any request, whatever ended up in the text.
"""

import html

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)

STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --card: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --faint: #898781;
  --line: #e1e0d9; --other: #b9b7ae; --c0: #2a78d6; --c1: #eb6834; --c2: #1baf7a; --c3: #4a3aa7; }
@media (prefers-color-scheme: dark) { :root { --page: #0d0d0d; --card: #1a1a19; --ink: #ffffff; --soft: #c3c2b7;
  --faint: #898781; --line: #2c2c2a; --other: #5f5e59; --c0: #3987e5; --c1: #d95926; --c2: #199e70; --c3: #9085e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  sans-serif; }
.bold { font-weight: 600; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 12px; } h3 { font-size: 14px;
  margin: 0 0 8px; }
.lead { color: var(--soft); margin: 4px 0 24px; }
.note { color: var(--soft); margin: 8px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  min-width: 0; }
.tile b { display: block; font-size: 22px; font-weight: 600; } .tile span { color: var(--soft); font-size: 13px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; overflow: visible; }
svg.bars { max-width: 640px; } svg.bars text { font-size: 14px; }
.grid { stroke: var(--line); } .tick { fill: var(--faint); } .label { fill: var(--ink); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; } .faint { opacity: .32; stroke-width: 1; }
.curve.s0 { stroke: var(--c0); } .curve.s1 { stroke: var(--c1); } .curve.s2 { stroke: var(--c2); }
  .curve.s3 { stroke: var(--c3); }
.dot.s0, .bar.s0 { fill: var(--c0); } .dot.s1 { fill: var(--c1); } .dot.s2 { fill: var(--c2); }
  .dot.s3 { fill: var(--c3); }
.bar.other { fill: var(--other); } .cross { stroke: var(--faint); stroke-dasharray: 3 3; }
.key { float: right; font-weight: 400; color: var(--soft); font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 5px 3px 12px; }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
  .k3 { background: var(--c3); }
.read { min-height: 1.5em; color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.scroll { max-height: 420px; overflow: auto; }
pre { margin: 0; overflow-x: auto; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); } details pre { margin-top: 10px; }
footer { margin-top: 40px; color: var(--faint); font-size: 13px; }
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const curves = JSON.parse(svg.dataset.chart), out = svg.parentNode.querySelector(".read");
  const make = (tag, css) => { const e = document.createElementNS(svg.namespaceURI, tag); e.setAttribute("class",
    css);
    e.style.display = "none"; svg.appendChild(e); return e; };
  const cross = make("line", "cross"), dots = curves.map(c => make("circle", "dot s" + c.colour));
  const box = svg.viewBox.baseVal;
  cross.setAttribute("y1", 0); cross.setAttribute("y2", box.height - 28);
  const number = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3)
    : String(+v.toPrecision(5));
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect(), at = (event.clientX - area.left) / area.width * box.width;
    let text = "";
    curves.forEach((c, i) => {
      let best = 0;
      c.px.forEach((x, j) => { if (Math.abs(x - at) < Math.abs(c.px[best] - at)) best = j; });
      if (i === 0) { cross.setAttribute("x1", c.px[best]); cross.setAttribute("x2", c.px[best]);
        text = "step " + c.x[best]; }
      dots[i].setAttribute("cx", c.px[best]); dots[i].setAttribute("cy", c.py[best]); dots[i].setAttribute("r", 4);
      dots[i].style.display = "";
      text += "   " + c.name + " " + number(c.y[best]) + (i && c.x[best] !== curves[0].x[best] ?
        " (step " + c.x[best] + ")" : "");
    });
    cross.style.display = ""; out.textContent = text;
  });
  svg.addEventListener("pointerleave", () => { cross.style.display = "none";
    dots.forEach(d => d.style.display = "none"); out.textContent = ""; });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, which must already be escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, name and value; both are escaped here."""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def tiles(items: list[tuple[str, str]]) -> str:
    """Headline numbers: (value, what it is)."""
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in items
    )
    return f'<div class="tiles">{cells}</div>'


def section(title: str, body: str) -> str:
    """A headed card; nothing when the body is empty."""
    return f'<section><h2>{html.escape(title)}</h2><div class="card">{body}</div></section>' if body else ""
