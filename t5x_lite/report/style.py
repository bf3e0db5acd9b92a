"""The style sheet of the page, light and dark, as a Python string: no data files to install."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1c2127; --muted: #5c6670; --rule: #dcdfe2; --grid: #eceef0; --bar: #a9c1de;
  --good: #1f6f4a; --bad: #b23a17; --extra: #fbdcd2; --lacks: #dceaf8;
  --c0: #4a525b; --c1: #1f5fa8; --c2: #b8501a; --c3: #1f7a4d; --c4: #7a4aa5; --c5: #8a6500; --c6: #0c7485;
  --c7: #b0336f; --c8: #5d6b1e; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e4e7ea; --muted: #9aa5af; --rule: #353b43; --grid: #252a30; --bar: #365a85;
  --good: #6fcf9d; --bad: #f3906a; --extra: #5b2a1b; --lacks: #1d3c5c;
  --c0: #b4bcc4; --c1: #7fb1ee; --c2: #f0995f; --c3: #6fcf9d; --c4: #c39bea; --c5: #dcb54a; --c6: #5cc6d6;
  --c7: #f08bb8; --c8: #b9c96a; } }
* { box-sizing: border-box; }
html { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: var(--paper); -webkit-text-size-adjust: 100%; }
body { max-width: 64rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .1rem; overflow-wrap: anywhere; }
h4 { font-size: .93rem; margin: 1.5rem 0 .2rem; }
p { margin: .2rem 0 .6rem; max-width: 46rem; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .2em; }
small, caption, .note, .x, .y { color: var(--muted); font-size: .82rem; }
h4 small { font-weight: normal; margin-left: .4em; }
.scroll { overflow-x: auto; }

table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .16rem .9rem .16rem 0; text-align: left; font-weight: normal; vertical-align: baseline; }
thead tr { border-bottom: 1px solid var(--rule); }
thead th { color: var(--muted); font-size: .82rem; white-space: nowrap; }
.scores th.n, .n { text-align: right; white-space: nowrap; }
.scores tbody tr:first-child > * { padding-top: .5rem; }
.scores tbody th[scope=rowgroup] { font-weight: 600; padding-right: 1.4rem; }
.scores .step { color: var(--muted); }
.scores td.best { font-weight: 600; }
.scores .aside > :not([scope=rowgroup]) { color: var(--muted); font-size: .86rem; font-weight: normal; }
.rates { width: 100%; max-width: 46rem; }
.rates .bar { width: 55%; padding-right: 0; }
.rates .bar div { height: .8rem; min-width: 1px; background: var(--bar); }

.confusion thead tr { border: 0; }
.confusion td, .confusion thead th { text-align: right; padding: .25rem .7rem; }
.confusion thead th:first-child { text-align: left; padding-left: 0; }
.confusion tbody th { padding-right: .9rem; white-space: nowrap; }
.confusion td { border: 1px solid var(--paper); }
.confusion .hit { background: color-mix(in srgb, var(--good) calc(var(--share) * 45%), transparent); }
.confusion .miss { background: color-mix(in srgb, var(--bad) calc(var(--share) * 45%), transparent); }
.confusion .sum { color: var(--muted); }

figure { margin: 0; min-width: 0; container-type: inline-size; }
figcaption { font-size: .86rem; overflow-wrap: anywhere; }
figcaption small { display: block; }
.plot { position: relative; margin: .7rem min(var(--gutter), 42cqw) 2rem 2.9rem; font-variant-numeric: tabular-nums; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; clip-path: inset(0 -.5rem -.5rem); }
.plot polyline, .plot path { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; }
.plot polyline { stroke-width: 1.6; stroke-linejoin: round; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.c8 { color: var(--c8); }
.plot .band { fill: currentColor; stroke: none; opacity: .22; }
.plot .grid { stroke: var(--grid); stroke-width: 1; }
.plot .dot { stroke-width: 5; stroke-linecap: round; }
.plot .best { stroke-width: 9; }
.x, .y, .end { position: absolute; line-height: 1rem; font-size: .78rem; white-space: nowrap; }
.x { top: calc(100% + .3rem); transform: translateX(-50%); }
.y { right: calc(100% + .5rem); transform: translateY(-50%); }
.end { left: calc(100% + .5rem); transform: translateY(-50%); max-width: calc(min(var(--gutter), 42cqw) - .5rem);
  overflow: hidden; text-overflow: ellipsis; }
.end b { font-weight: 600; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(16.5rem, 1fr)); gap: .6rem 1.6rem;
  margin-top: 1.2rem; }

.parts { display: flex; gap: 2px; height: .7rem; max-width: 46rem; margin: .3rem 0; }
.parts div { min-width: 2px; }
.parts .good { background: var(--good); } .parts .some { background: var(--bar); }
.parts .none { background: var(--bad); }
ol.examples { list-style: none; margin: .3rem 0 0; padding: 0; max-width: 52rem; }
.examples li { border-top: 1px solid var(--rule); padding: .5rem 0 .6rem; }
.examples dl { display: grid; grid-template-columns: 5.2rem 1fr; gap: .1rem .6rem; margin: 0; }
.examples dt { color: var(--muted); font-size: .82rem; line-height: 1.8; }
.examples dd { margin: 0; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.examples .input { color: var(--muted); font-size: .88rem; }
.verdict { float: right; margin: 0 0 0 1rem; font-size: .82rem; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.verdict.right { color: var(--good); } .verdict.wrong { color: var(--bad); }
ins, del { text-decoration: none; border-radius: .2em; padding: .05em .1em; color: inherit; }
ins { background: var(--extra); border-bottom: 2px solid var(--bad); }
del { background: var(--lacks); border-bottom: 2px dotted var(--c1); }
@media (max-width: 36rem) {
  html { font-size: 14px; } body { padding: 1.2rem .9rem 3rem; }
  .examples dl { grid-template-columns: 1fr; gap: 0; }
  th, td { padding-right: .5rem; }
  .scores { font-size: .88rem; } .scores tbody th[scope=rowgroup] { padding-right: .6rem; }
}
"""
