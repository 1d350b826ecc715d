"""Draws the Grafana dashboard from Prometheus' data, without Grafana: `python -m tools.draw_dashboard URL PNG`.

Its own small renderer, for pictures in the docs and for tests: time series and single values, in the
dashboard's grid. Needs chromium.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tools.gen_dashboard import DASHBOARD

_UNIT, _ROW = 60, 30
"""Pixels of a column and of a line of the grid."""
_COLORS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#b877d9", "#e02f44", "#37872d", "#8ab8ff")
_STYLE = """
body { margin: 0; background: #111217; color: #ccccdc; position: relative;
       font: 13px 'DejaVu Sans', sans-serif }
div { position: absolute; box-sizing: border-box }
.panel { background: #181b1f; border: 1px solid #2c3235; border-radius: 2px }
.title { left: 8px; top: 5px; font-weight: bold; font-size: 12px; white-space: nowrap }
.row { font-weight: bold; font-size: 15px; padding-top: 6px }
.value { width: 100%; top: 38%; text-align: center; font-size: 40px; color: #73bf69 }
.legend { left: 8px; right: 4px; bottom: 5px; font-size: 11px; white-space: nowrap }
"""
Series = list[tuple[str, list[tuple[float, float]]]]
"""Legend and points (seconds, value) of each."""


def draw(prometheus: str, picture: Path, *, seconds: int, rate_interval: str) -> None:
    """Draws the last `seconds`. Raises OSError and CalledProcessError."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    now = time.time()
    drawn = [_panel(panel, prometheus, now - seconds, now, rate_interval) for panel in panels]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * _ROW + 10
    page = f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style><body>{''.join(drawn)}</body>"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "dashboard.html")
        source.write_text(page, encoding="utf-8")
        command = [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(
                "--hide-scrollbars",
                f"--user-data-dir={directory}/profile",
                f"--window-size={24 * _UNIT},{height}",
            ),
            *(f"--screenshot={picture.absolute()}", source.as_uri()),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def filled_in(expression: str, rate_interval: str) -> str:
    """A query of the dashboard for all models and instances, with its variables' values in their place."""
    expression = expression.replace("$__rate_interval", rate_interval)
    return expression.replace("$model_name", ".*").replace("$instance", ".*")


def _panel(panel: dict[str, Any], prometheus: str, start: float, end: float, rate_interval: str) -> str:
    place = panel["gridPos"]
    left, top, width, height = place["x"] * _UNIT, place["y"] * _ROW, place["w"] * _UNIT, place["h"] * _ROW
    box = f"left:{left + 4}px;top:{top + 4}px;width:{width - 8}px;height:{height - 8}px"
    title = html.escape(panel["title"])
    if panel["type"] == "row":
        return f'<div class=row style="{box};overflow:visible">{title}</div>'
    series: Series = []
    for target in panel["targets"]:
        expression = filled_in(target["expr"], rate_interval)
        series += _range(prometheus, expression, target["legendFormat"], start, end)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        last = series[0][1][-1][1] if series else math.nan
        body = f"<div class=value>{_shown(last, unit)}</div>"
    else:
        body = _chart(series, unit, start, end, width - 8, height - 8)
    return f'<div class=panel style="{box}"><div class=title>{title}</div>{body}</div>'


def _range(prometheus: str, expression: str, legend: str, start: float, end: float) -> Series:
    step = max(1, round((end - start) / 120))
    fields = {"query": expression, "start": start, "end": end, "step": step}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(fields)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        found = json.load(answer)["data"]["result"]
    series = []
    for each in found:
        name = legend
        for label, value in each["metric"].items():
            name = name.replace("{{" + label + "}}", value)
        points = [(float(at), float(value)) for at, value in each["values"]]
        if points := [point for point in points if math.isfinite(point[1])]:
            series.append((name, points))
    return series


def _chart(series: Series, unit: str, start: float, end: float, width: int, height: int) -> str:
    most = max((value for _, points in series for _, value in points), default=0) or 1.0
    left, right, top, bottom = 58, width - 10, 30, height - 44

    def x(at: float) -> float:
        return left + (at - start) / (end - start) * (right - left)

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top)

    parts = []
    for share in (0.0, 0.5, 1.0):
        line = y(share * most)
        parts.append(f'<path d="M{left} {line:.1f}H{right}" stroke="#2c3235"/>')
        label = _shown(share * most, unit)
        parts.append(f'<text x="{left - 5}" y="{line + 4:.1f}" text-anchor="end">{label}</text>')
    for share in (0.0, 0.5, 1.0):
        clock = time.strftime("%H:%M:%S", time.gmtime(start + share * (end - start)))
        anchor = ("start", "middle", "end")[round(share * 2)]
        place = left + share * (right - left)
        parts.append(f'<text x="{place:.0f}" y="{bottom + 15}" text-anchor="{anchor}">{clock}</text>')
    legends = []
    for index, (name, points) in enumerate(series):
        color = _COLORS[index % len(_COLORS)]
        corners = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        legends.append(f'<span style="color:{color}">&#9644;</span> {html.escape(name)}')
    picture = f'<svg width={width} height={height} fill="#9a9aab" font-size="10">{"".join(parts)}</svg>'
    return f"{picture}<div class=legend>{' &nbsp; '.join(legends)}</div>"


def _shown(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "no data"
    if unit == "percentunit":
        return f"{value:.1%}" if value < 1 else "100%"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--rate-interval", default="1m")
    given = parser.parse_args()
    draw(given.prometheus, given.picture, seconds=given.seconds, rate_interval=given.rate_interval)


if __name__ == "__main__":
    main()
