"""The output of `saev size`: tables for people, JSON for programs."""

import io
import json
import sys
import typing as tp

import rich.box
import rich.table
import rich.text

from saev.config.size import SizeConfig
from saev.console import for_tables, size
from saev.size import inputs, models
from saev.size.estimate import estimate
from saev.size.rows import Row, Section


def print_sizes(cfg: SizeConfig) -> None:
    """Print the sizes to standard output.

    Raises:
        ConfigError: a flag is missing or does not fit.
        StorageError: the config file or the images cannot be read.
    """
    if cfg.model == "list":
        sys.stdout.write(_list_models())
        return
    given = inputs.gather(cfg)
    sections = estimate(given, cfg)
    text = _to_json(sections) if cfg.as_json else render(sections)
    sys.stdout.write(text)


def _list_models() -> str:
    out = io.StringIO()
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("--model", "--family", "architecture"):
        table.add_column(name)
    for name in ("width", "blocks", "patches"):
        table.add_column(name, justify="right")
    for name, vit in models.MODELS.items():
        patches = f"{vit.content_tokens()} of {vit.image_size} px"
        table.add_row(
            name, vit.family, vit.arch, str(vit.d_model), str(vit.n_layers), patches
        )  # fmt: skip
    for_tables(out).print(table)
    return out.getvalue()


def render(sections: list[Section]) -> str:
    """One table."""
    out = io.StringIO()
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections:
        table.add_section()
        table.add_row(rich.text.Text(section.name, style="bold"), "", "")
        for row in section.rows:
            table.add_row(row.what, _value(row), row.how)
    for_tables(out).print(table)
    return out.getvalue()


def _value(row: Row) -> str:
    prefix = {"exact": "", "about": "≈ ", "at most": "≤ ", "at least": "≥ "}[row.sure]
    if row.unit == "bytes":
        return prefix + size(row.value)
    if row.unit == "hours":
        return f"{prefix}{row.value:.1f} h"
    return f"{prefix}{row.value:,.0f}"


def _to_json(sections: list[Section]) -> str:
    rows: list[dict[str, tp.Any]] = [
        {"section": section.name, **row._asdict()} for section in sections for row in section.rows
    ]
    values = {row["key"]: row["value"] for row in rows}
    return json.dumps({"values": values, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
