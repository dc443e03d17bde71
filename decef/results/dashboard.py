"""A saved W&B workspace: accuracy against cost, curves by layer type, and a table of the runs."""

from __future__ import annotations

import json
from typing import Any

from decef.training.tracking import check_account

NAME = "decef"
VIEW = "decefdashboard"  # part of the workspace's address, by which `save` finds it again
COLUMNS = (
    *(f"config:{group}.value.name" for group in ("layer", "model", "dataset", "train")),
    *(f"summary:{key}" for key in ("test_top1", "flops", "params")),
)


def workspace(project: str, entity: str) -> Any:
    """The workspace, not yet saved: a `wandb_workspaces.workspaces.Workspace`.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ValueError("wandb-workspaces is not installed: pip install 'decef[results]'") from None
    layer = wr.Config("layer.name")
    top1, flops, params = (wr.SummaryMetric(name) for name in ("test_top1", "flops", "params"))

    def curve(metric: str, title: str) -> wr.LinePlot:
        return wr.LinePlot(
            title=title, x="epoch", y=[metric], groupby=layer, groupby_aggfunc="mean", groupby_rangefunc="stddev"
        )

    results: list[Any] = [
        wr.ScatterPlot(title="Test top-1 (%) against FLOPs", x=flops, y=top1, log_x=True),
        wr.ScatterPlot(title="Test top-1 (%) against parameters", x=params, y=top1, log_x=True),
        wr.BarPlot(title="Test top-1 (%), mean by layer type", metrics=["test_top1"], groupby=layer),
        wr.RunComparer(diff_only="split"),
    ]
    curves: list[Any] = [
        curve("test_top1", "Test top-1 (%)"),
        curve("test_loss", "Test loss"),
        curve("train_loss", "Training loss"),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name="Results", panels=results, is_open=True),
            ws.Section(name="Curves by layer type, mean and sd", panels=curves, is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            pinned_columns=list(COLUMNS), order=[ws.Ordering(ws.Summary("test_top1"), ascending=False)]
        ),
    )


def spec(project: str, entity: str) -> dict[str, Any]:
    """What `save` would send, as plain data. It needs neither an account nor an internet connection.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    view = workspace(project, entity)._to_model()
    return {"name": view.display_name, "spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))}


def save(project: str, entity: str | None = None) -> str:
    """Make the workspace in W&B, or replace the contents of the existing one; return its address.

    Raises:
        ValueError: wandb-workspaces is not installed, there is no API key, or W&B cannot be reached or refuses.
    """
    made = workspace(project, entity or "")
    check_account()
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        made.entity = entity or wandb.Api().default_entity
        made._internal_name = f"nw-{VIEW}-v"
        try:
            made._internal_id = type(made).from_url(made.url)._internal_id
        except ValueError:  # there is none yet
            made._internal_id = ""
        made.save()
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        raise ValueError(f"the workspace of W&B's project {project} cannot be saved: {error}") from error
    return made.url
