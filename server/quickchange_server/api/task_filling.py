"""What a version's task.json adds to a request that leaves it out. Knows no tokens.

A request with `raw_prompt`, one to a base, and a mix have no task: they get an empty one.
"""

from typing import TypeVar

from quickchange_adapters.task import Task

from quickchange_server.api.generation_plan import ModelChoice
from quickchange_server.api.schemas import GenerationBody

Body = TypeVar("Body", bound=GenerationBody)


def task_of(body: GenerationBody, model: ModelChoice) -> Task:
    """Return the task that a request is filled from."""
    if body.raw_prompt or body.adapters:
        return Task()
    return model.resolved[0].task or Task()


def fill_sampling(body: Body, task: Task) -> Body:
    """Return a body with the task's `stop`, `temperature` and `top_p` where it has none itself.

    `max_tokens` is not among them: unlike a caller's, a task's gives way to the context's end.
    """
    defaults = {
        "stop": list(task.stop) or None,
        "temperature": task.temperature,
        "top_p": task.top_p,
    }
    missing = {name: value for name, value in defaults.items() if getattr(body, name) is None}
    return body.model_copy(update=missing)
