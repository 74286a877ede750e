"""Says when trying again can help.

    @task(retries=3, retry_delay_seconds=[10, 60, 300], retry_condition_fn=may_help)

A network that fails may work in a minute; a bad input stays bad.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from lram.datasets.specs import BadInput


def may_help(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Tells Prefect whether a failed task is worth another attempt: not when its input is wrong."""
    try:
        state.result()
    except BadInput:
        return False
    except Exception:
        return True
    return False
