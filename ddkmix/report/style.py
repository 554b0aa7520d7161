"""The style sheet of the page: one column on a phone, light and dark, and what changes on paper.

Colours are Okabe and Ito's and Paul Tol's for the colour-blind, darkened or lightened until they have three
times the luminance of the page or a third of it, as WCAG asks of graphics. Dashes say the same again.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --box: #f5f7f9; --bar: #b9d3e6;
  --shade: #0004;
  --c0: #0072b2; --c1: #c04e00; --c2: #00805c; --c3: #882255;
  --c4: #8a6a00; --c5: #aa4499; --c6: #3a86b8; --c7: #4a4f55;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #0f1318; --ink: #e6eaee; --soft: #9aa5b1; --line: #323a44; --box: #181e25; --bar: #244a66;
    --shade: #fff4;
    --c0: #56b4e9; --c1: #ff8f4d; --c2: #2cc295; --c3: #ef7fae;
    --c4: #e6c229; --c5: #d9a0e8; --c6: #8fc7ff; --c7: #c9cfd6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 0.5rem; }
p { margin: 0.4rem 0; max-width: 46rem; }
.soft, figcaption, dt, .caption { color: var(--soft); }
progress { width: 100%; max-width: 24rem; height: 0.6rem; accent-color: var(--c0); }
dl {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr));
  gap: 0.75rem 1rem; margin: 1rem 0;
}
dt { font-size: 0.8rem; }
dd { margin: 0; font-size: 0.85rem; font-weight: 600; }
@media screen and (min-width: 1100px) {
  dl { display: flex; }
  dl div { flex: none; }
  dl div:first-child { flex: 1 1 8rem; }
  dl div:last-child { flex: 0 1 auto; min-width: 0; }
}
.note { border-left: 3px solid var(--c0); padding-left: 0.6rem; max-width: 60rem; }
/* a shadow at an edge behind which there is more: the covers move with the table, the shadows do not */
.scroll {
  overflow-x: auto; max-width: 100%; background-repeat: no-repeat;
  background-image: linear-gradient(to right, var(--page) 40%, transparent),
    linear-gradient(to left, var(--page) 40%, transparent),
    linear-gradient(to right, var(--shade), transparent), linear-gradient(to left, var(--shade), transparent);
  background-position: left, right, left, right;
  background-size: 2.5rem 100%, 2.5rem 100%, 1rem 100%, 1rem 100%;
  background-attachment: local, local, scroll, scroll;
}
.scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table {
  border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; min-width: 100%;
}
.caption { font-size: 0.85rem; max-width: 60rem; }
th, td {
  padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
}
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); padding-left: 0; }
tbody th:first-child { max-width: 9.5rem; overflow: hidden; text-overflow: ellipsis; }
td.text, th.text { text-align: left; }
td.bar { min-width: 9rem; width: 40%; padding: 0; }
th.bar { text-align: left; padding: 0; }
@media screen and (max-width: 600px) {
  th, td { padding: 0.2rem 0.4rem; }
  tbody th:first-child { max-width: 6.5rem; }
  td.bar { min-width: 5.5rem; }
}
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.25rem 2rem;
}
.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: 1rem;
}
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.9rem; }
.card {
  border-top: 2px solid var(--line); padding-top: 0.3rem; font-size: 0.78rem;
  display: flex; flex-direction: column; justify-content: flex-end;
}
.card figcaption { flex-grow: 1; align-content: flex-start; }
.card figcaption {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 0.5rem; font-size: 0.85rem;
}
.card b {
  color: var(--ink); max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
.card figcaption span { white-space: nowrap; font-size: 0.78rem; }
.card p { margin: 0; line-height: 1.35; color: var(--soft); }
svg { display: block; overflow: hidden; }
svg text { fill: var(--ink); font-size: 11px; }
svg .tick { fill: var(--soft); font-size: 10px; }
.small .tick { font-size: 9px; paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.curves, .arrow { overflow: visible; }
.arrow path { fill: none; stroke-linecap: round; }
.line, .dots, .bars {
  fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke;
}
.dots { stroke-width: 5; }
.bars { stroke-width: 1; opacity: 0.75; }
.many { stroke: var(--soft); stroke-width: 1; opacity: 0.35; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.line.s1, .line.s5 { stroke-dasharray: 7 4; }
.line.s2, .line.s6 { stroke-dasharray: 1 4; stroke-width: 2.4; }
.line.s3, .line.s7 { stroke-dasharray: 9 4 1 4; }
.student { stroke: var(--c0); }
.teacher { stroke: var(--c1); stroke-dasharray: 5 4; stroke-width: 1.4; }
.band { fill: var(--c0); opacity: 0.2; }
.area { fill: var(--c2); opacity: 0.45; }
.bar { fill: var(--bar); }
.whisker { stroke: var(--ink); stroke-width: 1.2; }
.point { fill: var(--c0); }
.key { display: inline-block; vertical-align: middle; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--soft); }
pre {
  background: var(--box); padding: 0.75rem; overflow-x: auto; overflow-wrap: normal; tab-size: 2;
  font: 0.8rem/1.45 ui-monospace, Menlo, Consolas, monospace;
}
@media print {
  @page { margin: 12mm; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .charts { grid-template-columns: 1fr 1fr; gap: 1rem; }
  .cards { grid-template-columns: repeat(4, 1fr); }
  .scroll { overflow: visible; background: none; }
  table { font-size: 6.5pt; }
  th, td { padding: 0.1rem 0.2rem; }
  th:first-child { position: static; }
  td.bar { min-width: 4rem; width: 16%; }
  pre { white-space: pre-wrap; font-size: 7.5pt; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; height: auto; }
  summary { list-style: none; }
  .bar, .band, .area, .point { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
