"""Make the web workspace of a W&B project: what matters first, heads side by side in one chart.

    python docs/make_workspace.py TEAM/PROJECT

For those who are logged in (`wandb login`); `pip install wandb-workspaces` first. Charts of the
section `a_main` show all runs and heads; the other sections are those of the runs, in their order.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kanllama_lightning.runs.sections import SECTIONS, charted, titled_section  # noqa: E402

NAME = "KAN-LLaMA Lightning"
COLUMNS = 3


def main_charts() -> dict[str, str]:
    """Titles of the charts that are looked at first, and which figures each shows."""
    names = (charted(figure) for figure in SECTIONS["main"])
    return {name.partition("/")[2]: rf"^{re.escape(name)}(/.*)?$" for name in names if name}


def workspace(team: str, project: str) -> Any:
    """The workspace, not yet saved.

    Args:
        team: Whose project it is.
        project: As in `--trainer.logger.init_args.project`.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    charts = [
        reports.LinePlot(title=title, metric_regex=figures)
        for title, figures in main_charts().items()
    ]
    layout = workspaces.SectionLayoutSettings(columns=COLUMNS, rows=-(-len(charts) // COLUMNS))
    first = workspaces.Section(
        name=titled_section("main"), panels=charts, is_open=True, layout_settings=layout
    )
    return workspaces.Workspace(
        name=NAME, entity=team, project=project, sections=[first], auto_generate_panels=True
    )


def main(args: list[str]) -> int:
    """Make it; returns the exit code."""
    team, slash, project = args[0].partition("/") if len(args) == 1 else ("", "", "")
    if not (team and slash and project) or "/" in project:
        print(f"error: {' '.join(args)!r}: give TEAM/PROJECT", file=sys.stderr)
        return 2
    try:
        made = workspace(team, project)
    except ModuleNotFoundError as e:
        print(f"error: {e.name} is missing: pip install wandb-workspaces", file=sys.stderr)
        return 2
    print(made.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
