"""`mpo report`: runs' folders → one self-contained HTML file, and PNG files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpo_megatron.config import ConfigError, ReportConfig, check_writable
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.report.content import content
from mpo_megatron.report.health import missing_data
from mpo_megatron.report.held_out import Limits
from mpo_megatron.report.run_record import read_run
from mpo_megatron.terminal.visible import visible

PAGE = Path(__file__).parent / "page"


def report(config: ReportConfig) -> None:
    """Write the page, and the PNG files if requested.

    Raises:
        ConfigError: a folder holds no run, or the page cannot be written.
    """
    output = Path(config.output)
    if output.is_dir():
        raise ConfigError(f"output = {output}: it is a folder; name a file, such as {output / 'report.html'}.")
    check_writable(output.parent, "output")
    runs = [read_run(Path(folder)) for folder in config.runs]
    for run in runs:
        if run.missing:
            print(visible(f"{run.folder}: {missing_data(run)}"), file=sys.stderr)
    limits = Limits(config.max_groups, config.max_responses, config.max_characters)
    shown = content(runs, limits)
    text = render(shown).encode()
    replace_file(output, [text])
    print(f"{output}: {visible(', '.join(run['name'] for run in shown['runs']))} ({len(text) / 2**20:.1f} MB)")
    if config.png is not None:
        from mpo_megatron.report.pictures import write_pictures

        for path in write_pictures(shown, Path(config.png)):
            print(path)


def render(shown: dict[str, Any]) -> str:
    """The page as text, self-contained."""
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("mpo_megatron.report", "page"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        title=" · ".join(run["name"] for run in shown["runs"]),
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup((PAGE / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        content=Markup(script_json(shown)),
    )


def script_json(value: Any) -> str:
    """JSON that is safe within <script>: no text in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
