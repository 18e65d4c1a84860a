"""Pages that are made from the code when the site is built: every command, the metrics, notebooks, two root files.

mkdocs calls the functions whose names begin with on_; https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from routesae.analyze.scores.metrics import METRICS
from routesae.cli import main
from routesae.console.commands import FIRST, LAST, SettingsCommand

ROOT = Path(__file__).resolve().parent.parent
LINKS = Path(tempfile.mkdtemp())
COMMANDS = "reference/commands"


def on_startup(**_: Any) -> None:
    """Let mkdocstrings find the package by its name: the checkout's folder may have any other."""
    (LINKS / "routesae").symlink_to(ROOT)
    sys.path.insert(0, str(LINKS))


def on_shutdown() -> None:
    """Take the link away."""
    shutil.rmtree(LINKS)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each command into the navigation."""
    pages = [{name: f"{COMMANDS}/{page}"} for name, page, _ in commands()]
    reference: list[Any] = next(part["Reference"] for part in config.nav or [] if "Reference" in part)
    reference[0] = {"Commands": [f"{COMMANDS}/index.md", *pages]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file in docs/ holds."""
    made = {f"{COMMANDS}/{page}": command_page(name, command) for name, page, command in commands()}
    made[f"{COMMANDS}/index.md"] = index_page()
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text()
    made["changelog.md"] = (ROOT / "CHANGELOG.md").read_text()
    for notebook in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        made[f"tutorials/{notebook.stem}.md"] = notebook_page(notebook)
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the table of metrics where a page asks for it."""
    rows = [f"| {one.name} | {one.meaning} | {'yes' if one.needs_lm else 'no'} |" for one in METRICS.values()]
    table = "\n".join(["| `--metric` | what it is | needs the LM |", "|---|---|---|", *rows])
    return markdown.replace("{{ metrics }}", table)


def commands() -> Iterator[tuple[str, str, click.Command]]:
    """Name, page and command of everything that can be typed after `routesae`."""
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            for part, inner in command.commands.items():
                yield f"{name} {part}", f"{name}-{part}.md", inner
        else:
            yield name, f"{name}.md", command


def index_page() -> str:
    rows = [f"| [`routesae {name}`]({page}) | {first_sentence(command)} |" for name, page, command in commands()]
    return "\n".join(
        [
            "# Commands",
            "",
            "These pages are made from the settings classes that the commands are made from, so they say what",
            "`routesae COMMAND --help` says. A TOML file for `--config` takes the same names without the dashes.",
            "",
            "| command | |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def first_sentence(command: click.Command) -> str:
    return str(command.help).partition("\n\n")[0].replace("\n", " ")


def command_page(name: str, command: click.Command) -> str:
    """Synopsis, what the command does, its example, and a table of flags for each group of its settings."""
    context = click.Context(command, info_name=f"routesae {name}")
    lines = [f"# routesae {name}", "", str(command.help), ""]
    lines += ["```", " ".join(command.get_usage(context).removeprefix("Usage: ").split()), "```", ""]
    if command.epilog:
        lines += ["Example:", "", f"    {command.epilog}", ""]
    grouped: dict[str, list[click.Parameter]] = {}
    for group, parameter in parameters(command, context):
        grouped.setdefault(group, []).append(parameter)
    order = [*FIRST, *(group for group in grouped if group != LAST), LAST]
    for group in dict.fromkeys(order):
        if group in grouped:
            lines += [f"## {group}", "", "| | | default |", "|---|---|---|"]
            lines += [row for parameter in grouped[group] if (row := flag_row(parameter, context))]
            lines += [""]
    return "\n".join(lines)


def parameters(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Parameter]]:
    """Every option and argument, with the group that --help shows it in."""
    groups = command.generated if isinstance(command, SettingsCommand) else {}
    for parameter in command.get_params(context):
        known = groups.get(str(parameter.name))
        group = "Arguments" if isinstance(parameter, click.Argument) else known[0] if known else LAST
        yield group, parameter


def flag_row(parameter: click.Parameter, context: click.Context) -> str | None:
    """One line of a table: the flag and what it takes, what it does, its default."""
    if isinstance(parameter, click.Argument):
        written, text = str(parameter.name).upper(), str(getattr(parameter, "help", "") or "")
    else:
        record = parameter.get_help_record(context)
        if record is None or "--help" in record[0]:
            return None
        written, text = record
    body, _, default = text.partition("  [default: ")
    cells = [f"`{written}`", body, default.removesuffix("]")]
    return "| " + " | ".join(in_cell(cell) for cell in cells) + " |"


def in_cell(text: str) -> str:
    """Text as a cell of a Markdown table: bars escaped; what stands in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    quoted = [
        part if part.startswith("`") else re.sub(r"([\[\]])", r"\\\1", html.escape(part, False)) for part in parts
    ]
    return "".join(quoted).replace("|", "\\|")


def notebook_page(notebook: Path) -> str:
    """A notebook as a page: its Markdown, its code, and what the code printed when it was last run."""
    cells = json.loads(notebook.read_text())["cells"]
    first, *rest = cells
    heading, _, text = "".join(first["source"]).partition("\n")
    download = f"[Download this notebook]({notebook.name}){{ download }}, or run it from `docs/tutorials/`."
    lines = [heading, "", download, "", text, ""]
    for cell in rest:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            lines += [*shown(output), ""]
    return "\n".join(lines)


def shown(output: dict[str, Any]) -> list[str]:
    """An output of a cell as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        return [f'<img alt="what the cell drew" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">']
    if "text/html" in data:
        compact = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))  # a blank line would end the HTML block
        return [f'<div class="output" markdown="0">\n{compact}\n</div>']
    if output.get("name") == "stderr":  # bars of progress
        return []
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(output.get("text", data.get("text/plain", ""))))
    return ["```{ .text .output }", text.rstrip("\n"), "```"] if text.strip() else []
