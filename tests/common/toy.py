"""A tiny real model for each task, and a config that trains it on the task's toy examples."""

from dataclasses import replace
from pathlib import Path

from common.config import TaskName

TINY: dict[TaskName, dict[str, object]] = {
    TaskName.text_classification: {"labels": ["sport", "money"]},
}
"""What a tiny config of each task changes in the suite's own."""


def toy_config(task: TaskName, tiny_config, folder: Path):
    """The tiny private run, of this task, on a model in `folder` where the task needs another."""
    changes = TINY[task]
    data = replace(tiny_config.data, labels=changes["labels"])
    return replace(tiny_config, task=replace(tiny_config.task, name=task), data=data)
