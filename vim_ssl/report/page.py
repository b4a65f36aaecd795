"""The frame of a run's page: template, style and script, all inline."""

from string import Template

USE = Template("""\
import torch, vim_ssl
from PIL import Image

encoder = vim_ssl.load_encoder($run)
transform = vim_ssl.create_transform(encoder)
with torch.inference_mode():
    x = transform(Image.open("image.png"))[None]
    features = encoder(x)                   # (1, $d)
    tokens = encoder.forward_features(x)    # (1, tokens, $d)
""")

# The policy lets the page ask for nothing: not even a slip of ours can.
PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #202326; --soft: #5d6469;
  --rule: #dfe2e3; --line: #0b6b74; --code: #f1f3f3; }
@media (prefers-color-scheme: dark) { :root { --back: #15181a; --text: #e3e6e7; --soft: #9aa3a8;
  --rule: #30363a; --line: #63c5cd; --code: #1e2326; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: auto; padding: 40px 20px 80px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
h3, figcaption { font-size: .95rem; font-weight: 600; margin: 0 0 .25rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.25rem; }
.lede { font-size: 1.1rem; max-width: 48em; margin: 0; }
.note, small, output, .strip span, dt { color: var(--soft); }
.note { max-width: 48em; margin: .25rem 0 1rem; font-size: .9rem; }
figure, dl, dd { margin: 0; }
.tiles { display: grid; gap: 1.25rem 2rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
.tiles dt { font-size: .85rem; }
.tiles small { display: block; line-height: 1.4; }
.tiles b { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.3; }
.pair { display: grid; gap: 2rem 3rem; margin-bottom: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 364px), 1fr)); }
.strip { display: grid; gap: 4px; align-items: end;
  grid-template-columns: repeat(var(--n), minmax(0, var(--side))); }
.strip span { font-size: .75rem; line-height: 1.2; }
.strip img { width: 100%; display: block; }
.small img { image-rendering: pixelated; }
.curves { display: grid; gap: 1.75rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
svg { width: 100%; display: block; touch-action: pan-y; }
output { display: block; font-size: .85rem; }
.axes line { stroke: var(--rule); }
.axes text { fill: var(--soft); font-size: 12px; }
.line { stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round; fill: none; }
.line circle, .cursor { fill: var(--line); stroke: var(--back); }
.cursor[hidden] { display: none; }
.band { fill: var(--line); opacity: .18; }
.scroll { overflow-x: auto; }
.sheet { max-width: 100%; display: block; margin: 1rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { text-align: left; padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tbody th { font-weight: 400; }
tbody tr:first-child > * { font-weight: 600; }
.even tr:first-child > td, .even tbody tr:first-child > th { font-weight: 400; }
.cosines { margin-bottom: 2rem; }
.cosines td, .cosines th { padding: .4rem .6rem; vertical-align: middle; }
.cosines td:last-child { min-width: 16em; }
.cosines img { display: block; }
td small { font-weight: 400; white-space: nowrap; }
.facts { display: grid; gap: 1.5rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.facts dl { display: grid; grid-template-columns: 9.5em 1fr; gap: .2rem 1rem; font-size: .9rem; }
details { margin-top: 1.5rem; font-size: .9rem; }
pre { background: var(--code); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, monospace; overflow-wrap: normal; margin: .75rem 0; }
.code { position: relative; }
.code button { position: absolute; top: .5rem; right: .5rem; font: .8rem system-ui, sans-serif; }
@media (max-width: 600px) {
  table { font-size: .8rem; }
  th, td { padding-right: .6rem; }
  td small { display: block; }
  .code button { position: static; }
}
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  const output = svg.parentNode.querySelector("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute("cx", near[0]);
    cursor.setAttribute("cy", near[1]);
    cursor.removeAttribute("hidden");
    output.textContent = near[2];
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "");
    output.textContent = output.dataset.rest;
  });
}
if (navigator.clipboard) for (const block of document.querySelectorAll(".code")) {
  const button = block.appendChild(document.createElement("button"));
  button.textContent = "Copy";
  button.onclick = () => navigator.clipboard.writeText(block.querySelector("code").textContent)
    .then(() => { button.textContent = "Copied"; });
}
"""
