"""The page that `report` fills: HTML, CSS and light and dark colours in one Jinja template, without any script."""

COLOURS = (
    ("#6b7280", "#a3adbb"),
    ("#c2500a", "#ff9a5c"),
    ("#0b68b0", "#63b3f4"),
    ("#0a7d5b", "#45cf9f"),
    ("#a8447c", "#ee9ac8"),
    ("#8a6500", "#e6bf4f"),
    ("#5b54c4", "#aaa5ff"),
)
"""Light and dark colour of each run; the base is grey. Each has a contrast of at least 4.5 with its page."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f27; --muted: #5a6371; --line: #dde1e7; --accent: #0b68b0;
  {%- for light, _ in colours %} --run-{{ loop.index0 }}: {{ light }};{% endfor %}
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --panel: #1d2128; --ink: #e6e9ee; --muted: #9ca6b4; --line: #343a45; --accent: #63b3f4;
    {%- for _, dark in colours %} --run-{{ loop.index0 }}: {{ dark }};{% endfor %}
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 .25rem; font-size: 1.7rem; line-height: 1.25; letter-spacing: -.01em; }
h2 { margin: 2.75rem 0 .5rem; font-size: 1.15rem; }
h3 { margin: 1.5rem 0 .4rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 48rem; }
.muted, figcaption, .note { color: var(--muted); }
figcaption, .note { font-size: .875rem; max-width: 48rem; }
.verdict {
  margin: 1.5rem 0 0; padding: .9rem 1.2rem; background: var(--panel); border-left: 4px solid var(--accent);
  border-radius: 0 6px 6px 0;
}
.verdict p { max-width: none; font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { padding: .42rem 1.5rem .42rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; padding: .42rem 0 .42rem 1.75rem; }
td.number + td:not(.number), th.number + th:not(.number) { padding-left: 1.75rem; }
thead th { border-bottom-width: 2px; font-weight: 600; }
tbody th { font-weight: 400; }
tr.section th { padding-top: 1rem; color: var(--muted); font-size: .8rem; font-weight: 600; }
.interval { display: block; color: var(--muted); font-size: .8rem; }
.run { white-space: nowrap; }
.run::before {
  content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 2px;
  background: var(--colour);
}
.lined .run::before { width: 1.6em; height: .22em; margin-bottom: .25em; border-radius: 0; }
.lined .key-1::before {
  background: repeating-linear-gradient(90deg, var(--colour) 0 .42em, transparent .42em .59em);
}
.lined .key-2::before { background: repeating-linear-gradient(90deg, var(--colour) 0 .17em, transparent .17em .36em); }
.lined .key-3::before {
  background: repeating-linear-gradient(90deg, var(--colour) 0 .5em, transparent .5em .65em, var(--colour) .65em .8em,
    transparent .8em .95em);
}
.lined .key-4::before { background: repeating-linear-gradient(90deg, var(--colour) 0 .28em, transparent .28em .44em); }
.lined .key-5::before {
  background: repeating-linear-gradient(90deg, var(--colour) 0 .48em, transparent .48em .6em, var(--colour) .6em .74em,
    transparent .74em .86em, var(--colour) .86em 1em, transparent 1em 1.12em);
}
.seeds { display: block; font-size: .75rem; }
.strong { font-weight: 650; }
.dense td.number, .dense th.number { padding-left: 1.1rem; white-space: nowrap; }
.dense th.number { white-space: normal; vertical-align: bottom; min-width: 6.4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .5rem 0 0; padding: 0; list-style: none; }
figure { margin: .75rem 0 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
.wide svg { max-width: 46rem; min-width: 26rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem 1.5rem; }
.pair { grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); }
.pair figure { max-width: 32rem; }
dl { margin: .5rem 0; max-width: 48rem; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; color: var(--muted); }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre {
  margin: .5rem 0; padding: .8rem 1rem; overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px;
}
td code { overflow-wrap: anywhere; }
.answers { margin: .15rem 0 0; padding: 0; list-style: none; }
.pictures { display: flex; flex-wrap: wrap; gap: .4rem; margin: .1rem 0 .35rem; }
.pictures img { max-width: 100%; height: auto; border: 1px solid var(--line); }
.enlarged { image-rendering: pixelated; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; }
  table { font-size: .85rem; }
  th, td { padding-right: .8rem; }
  td.number, th.number { padding-left: .8rem; }
  td.number + td:not(.number), th.number + th:not(.number) { padding-left: .8rem; }
}
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
</style>
</head>
<body{% if lined %} class="lined"{% endif %}>
{% macro swatch(label) -%}
<span class="run key-{{ styles[label].dash }}" style="--colour: var(--run-{{ styles[label].slot }})">{{ label }}</span>
{%- endmacro %}
{% macro legend(shown) -%}
<ul class="legend">{% for label in shown %}<li>{{ swatch(label) }}</li>{% endfor %}</ul>
{%- endmacro %}
{% macro number(shown) -%}
{% if shown.strong %}<span class="strong">{{ shown.value }}</span>{% else %}{{ shown.value }}{% endif %}
{% if shown.interval %}<span class="interval">{{ shown.interval }}</span>{% endif %}
{% if shown.seeds %}<span class="seeds">{{ shown.seeds }}</span>{% endif %}
{%- endmacro %}
{% macro lines(rows, columns) -%}
<div class="scroll"><table class="dense">
<thead><tr><th></th>{% for title, _ in columns %}<th class="number">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name in rows %}
{% set place = loop.index0 %}
<tr><th scope="row">{{ swatch(name) }}</th>
{% for _, cells in columns %}<td class="number">{{ number(cells[place]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro %}
{% macro descriptions(described) -%}
{% for name, text in described %}<p class="note"><strong>{{ name }}</strong>: {{ text }}</p>{% endfor %}
{%- endmacro %}
<header>
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
</header>
{% if sentences %}
<div class="verdict">{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}</div>
{% endif %}

<h2>What each policy {{ "solves" if largest else "does" }}</h2>
{% if many %}
{{ lines(names, columns) }}
{% else %}
<div class="scroll"><table>
<thead><tr><th></th>{% for label in names %}<th class="number">{{ swatch(label) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, metrics in sections %}
<tr class="section"><th colspan="{{ names|length + 1 }}">{{ name }}</th></tr>
{% for metric, cells in metrics %}
<tr><th scope="row">{{ metric }}</th>
{% for shown in cells %}<td class="number">{{ number(shown) }}</td>{% endfor %}</tr>
{% endfor %}
{% endfor %}
</tbody></table></div>
{% endif %}
<p class="note">{{ caption }}</p>
{% if every_run %}
<details><summary>Every run</summary>
{{ lines(every_run_names, every_run) }}
</details>
{% endif %}

{% if curve %}
<h2>pass@k</h2>
{{ legend(names) }}
<figure class="wide"><div class="scroll">{{ curve }}</div>
<figcaption>Share of problems solved by at least one of k answers
{%- if banded %}; bands: {{ level }} intervals{% endif %}{% if every_run %}; means over seeds{% endif %}.</figcaption>
</figure>
{% endif %}

{% if differences %}
<h2>Paired differences</h2>
<div class="scroll"><table>
<thead><tr><th>run</th><th>minus</th><th>metric</th><th class="number">points</th><th>significant</th></tr></thead>
<tbody>
{% for difference in differences %}
<tr><td>{{ swatch(difference.run) }}</td><td>{{ swatch(difference.against) }}</td><td>{{ difference.metric }}</td>
<td class="number">{{ number(difference.shown) }}</td><td>{{ "yes" if difference.significant else "no" }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">The same problems on both sides. Significant: the {{ level }} interval excludes 0; not adjusted for the
number of rows.</p>
{% endif %}

{% if against_base %}
<h2>Paired differences to {{ base }}</h2>
{{ lines(names[1:], against_base) }}
<p class="note">The same problems on both sides. Bold: the {{ level }} interval excludes 0; not adjusted for the
number of rows.{% if every_run %} A pool of seeds enters with the mean over them, problem by problem.{% endif %}</p>
{% endif %}

{% if orderings %}
<h2>Order of {{ leading }}</h2>
<div class="scroll"><table>
<thead><tr><th>metric</th>{% if ordered_at %}<th>at</th>{% endif %}<th>highest to lowest</th></tr></thead>
<tbody>
{% for metric, rows in orderings %}
{% for at, words in rows %}
<tr>{% if loop.first %}<td rowspan="{{ rows|length }}">{{ metric }}</td>{% endif %}
{% if ordered_at %}<td>{{ at }}</td>{% endif %}<td>{{ words }}</td></tr>
{% endfor %}
{% endfor %}
</tbody></table></div>
<p class="note">&gt;: the {{ level }} interval of the paired difference to the next one, over problems and pooled over
seeds, lies above 0; ≈: it does not. Not adjusted for the number of comparisons.</p>
{% endif %}

{% if further %}
<h2>On other tasks</h2>
{% for task in further %}
<h3>{{ task.name }}</h3>
{{ lines(names, task.columns) }}
<p class="note">{{ task.caption }}</p>
{% if task.panels %}
<div class="{{ "wide" if task.crowd else "panels pair" }}">
{% for panel in task.panels %}<figure>{{ panel }}</figure>{% endfor %}
</div>
{% endif %}
{% endfor %}
<p class="note">Tasks that these runs do not train on. Bold: the {{ level }} interval of the paired difference excludes
0; not adjusted for the number of rows.
{%- if further[0].panels %} Drawings: what was learned (to the right) against what was forgotten (down); the dashed
lines cross at {{ base }}.{% endif %}</p>
{% endif %}

{% if frontier %}
<h2>Divergence against accuracy</h2>
{% if frontier.drawings %}
<div class="{{ "wide" if frontier.crowd else "panels pair" }}">
{% for drawing in frontier.drawings %}<figure>{{ drawing }}</figure>{% endfor %}
</div>
<p class="note">{{ frontier.x }} to {{ base }} against what it buys: up and to the left is better.
{%- if frontier.along %} Lines follow {{ frontier.along }}, whose values stand beside the points.{% endif %}
{%- if every_run %} Small points: seeds.{% endif %}
{%- if not frontier.crowd %} Vertical lines: {{ level }} intervals.{% endif %}</p>
{% endif %}
{{ lines(names, frontier.columns) }}
{{ descriptions(frontier.described) }}
{% endif %}

{% if diversity %}
<h2>Diversity</h2>
{% if diversity.panels %}
{{ legend(names) }}
<div class="panels">{% for panel in diversity.panels %}<figure>{{ panel }}</figure>{% endfor %}</div>
<p class="note">By sampling temperature.</p>
{% endif %}
{{ descriptions(diversity.described) }}
{% for title, found in diversity.tables %}
<details{% if not many %} open{% endif %}><summary>{{ title }}</summary>
{{ lines(names, found) }}
</details>
{% endfor %}
{% endif %}

{% if calibration %}
<h2>Calibration</h2>
{{ lines(names, calibration.columns) }}
{{ descriptions(calibration.described) }}
{% if calibration.panels %}
{{ legend(names) }}
<div class="panels pair">{% for panel in calibration.panels %}<figure>{{ panel }}</figure>{% endfor %}</div>
<p class="note">Share of right choices by confidence, a point per bin; its area grows with the bin's pairs, and bins
with less than {{ few }} of them are left out. A calibrated policy lies on the dashed line, an overconfident one below
it.</p>
{% endif %}
{% endif %}

{% if groups %}
<h2>By number of solutions</h2>
{% if bars %}
{{ legend(names) }}
<figure class="wide"><div class="scroll">{{ bars }}</div>
<figcaption>pass@{{ largest }} on problems with few and with many solutions, split at the median, with {{ level }}
intervals.</figcaption></figure>
{% endif %}
<div class="scroll"><table>
<thead><tr><th>problems with</th><th>run</th><th class="number">pass@{{ largest }}, %</th>
<th class="number">minus {{ base }}, points</th></tr></thead>
<tbody>
{% for name, rows in groups %}
{% for row in rows %}
<tr>{% if loop.first %}<td rowspan="{{ rows|length }}">{{ name }}</td>{% endif %}
<td>{{ swatch(row.run) }}</td>
<td class="number">{{ number(row.shown) }}</td><td class="number">{{ number(row.difference) }}</td></tr>
{% endfor %}
{% endfor %}
</tbody></table></div>
{% endif %}

{% if panels %}
<h2>Training</h2>
{{ legend(logged) }}
<div class="panels">{% for panel in panels %}<figure>{{ panel }}</figure>{% endfor %}</div>
<p class="note">By optimiser step{% if every_run %}, means over seeds{% endif %}. {% if banded %}Faint: logged values
{%- if every_run %}, or the range of the seeds{% endif %}; strong: their {% else %}The {% endif %}centred mean over
{{ smoothing }} of the run.</p>
{% endif %}

{% if lost_summary %}
<h2>Problems that were lost</h2>
<p>{{ lost_summary }}</p>
{% if examples %}
<div class="scroll"><table>
<thead><tr><th>problem</th>{% for label in shown_runs %}<th>{{ swatch(label) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for example in examples %}
<tr><td>{% if example.images %}<div class="pictures">{% for image in example.images %}
<img src="{{ image.source }}" width="{{ image.width }}"{{ ' class="enlarged"'|safe if image.enlarged }}
 alt="Image {{ loop.index }} of the problem: {{ example.prompt }}">
{% endfor %}</div>{% endif %}<code>{{ example.prompt }}</code></td>
{% for answers in example.runs %}
<td>{{ answers.correct }} of {{ answers.total }} correct
<ul class="answers">{% for text, count, right in answers.top %}
<li>{{ "✓" if right else "✗" }} <code>{{ text }}</code> <span class="muted">× {{ count }}</span></li>
{% endfor %}</ul></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="note">The problems with the largest losses, not typical ones; the most frequent answers of each run.</p>
{% endif %}
{% endif %}

<h2>How to read this</h2>
<dl>
{% if largest %}
<dt>pass@k</dt><dd>The probability that at least one of k answers is correct, 1 − C(n−c, k)/C(n, k) from c correct ones
among n. pass@1 is accuracy; pass@k at large k is what the policy can still find.</dd>
<dt>Distinct correct</dt><dd>The expected number of different correct answers to a problem among {{ draws }}
answers.</dd>
<dt>Retention and gain at k</dt><dd>The probability that a problem is solved by k answers now, given that k answers of
{{ base }} solved it (retention) or did not (gain). The column of {{ base }} is a second draw of its own answers: what
retention would be if nothing had changed.</dd>
{% endif %}
<dt>Intervals</dt><dd>{{ level }} percentile bootstrap over problems ({{ resamples }} resamples). They cover which
problems were asked and which answers were drawn, not what another training seed would have given.</dd>
<dt>Answer length</dt><dd>Tokens per answer, the end-of-sequence token included; an answer is truncated when the limit
of {{ max_tokens }} tokens cut it off.</dd>
</dl>

<h2>Reproduce</h2>
<pre>{{ command }}</pre>
<details><summary>Resolved recipe</summary><pre>{{ recipe }}</pre></details>
<details><summary>Provenance</summary>
<div class="scroll"><table><tbody>
{% for name, value in provenance %}
<tr><th scope="row">{{ name }}</th><td><code>{{ value }}</code></td></tr>
{% endfor %}
</tbody></table></div></details>
</body>
</html>
"""
