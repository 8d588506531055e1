"""The command `compare`: two versions side by side."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from quickchange_client.cli.byte_progress import count_progress
from quickchange_client.cli.comparison_tables import print_fields, print_norms, print_outputs
from quickchange_client.cli.output import print_json_value
from quickchange_client.cli.prompt_file import read_prompts
from quickchange_client.cli.session import JsonOption, UrlOption, session
from quickchange_client.client import Quickchange
from quickchange_client.comparison import (
    AskOptions,
    OutputPair,
    Side,
    compare_fields,
    compare_norms,
    compare_outputs,
    read_side,
)

SIDE_HELP = "An adapter (NAME, NAME:3, NAME@ALIAS, NAME@sha256:DIGEST) or the base."

FirstArgument = Annotated[str, typer.Argument(metavar="A", help=SIDE_HELP)]
SecondArgument = Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        "--prompts", metavar="FILE", help="Ask both: a prompt a line, or .jsonl; - is stdin."
    ),
]
FieldOption = Annotated[
    str, typer.Option("--field", metavar="NAME", help="What a .jsonl file calls the prompt.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Ask only the first N prompts.")
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", metavar="N", min=1, help="Most tokens of an answer; else the task's, or 64."
    ),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0, help="0 is greedy.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="The same for both, where it matters.")
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Continue the prompts as plain text, without a chat.")
]
RawPromptOption = Annotated[
    bool, typer.Option("--raw-prompt", help="Leave the adapters' task.json aside.")
]


def compare(
    a: FirstArgument,
    b: SecondArgument,
    prompts: PromptsOption = None,
    field: FieldOption = "prompt",
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    raw: RawOption = False,
    raw_prompt: RawPromptOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show two versions side by side: configs, norms of the updates, and answers.

    Without --prompts nothing is generated. Exit code 1 when a prompt was refused.

    Examples:
        quickchange compare sentiment:2 sentiment:3

        quickchange compare sentiment@canary sentiment --prompts reviews.txt

        quickchange compare sentiment smollm2-135m --prompts test.jsonl --field text --limit 20

        quickchange compare sentiment:2 sentiment:3 --prompts reviews.txt --json
    """
    options = AskOptions(max_tokens, temperature, seed, raw, raw_prompt)
    with session(url, as_json) as client:
        asked = [] if prompts is None else read_prompts(prompts, field, limit)
        sides = (read_side(client, a), read_side(client, b))
        outputs = _outputs(client, sides, asked, options, is_shown=not as_json)
    if as_json:
        print_json_value(_json(sides, outputs))
    else:
        print_fields(sides)
        print_norms(sides)
        print_outputs(sides, outputs)
    if any(each.a.error or each.b.error for each in outputs):
        raise typer.Exit(1)


def _outputs(
    client: Quickchange,
    sides: tuple[Side, Side],
    prompts: list[str],
    options: AskOptions,
    *,
    is_shown: bool,
) -> list[OutputPair]:
    with count_progress("asking", is_shown=is_shown and bool(prompts)) as progress:
        return compare_outputs(client, sides, prompts, options, progress)


def _json(sides: tuple[Side, Side], outputs: list[OutputPair]) -> dict[str, Any]:
    a, b = sides
    fields = compare_fields(a, b)
    return {
        "object": "comparison",
        "a": _side_json(a),
        "b": _side_json(b),
        "differences": [asdict(each) for each in fields if not each.is_equal],
        "norms": [asdict(each) for each in compare_norms(a, b)],
        "outputs": [{**asdict(each), "equal": each.is_equal} for each in outputs],
        "num_equal": sum(each.is_equal for each in outputs),
    }


def _side_json(side: Side) -> dict[str, Any]:
    version = side.version
    return {
        "model": side.model,
        "name": version and version.name,
        "version": version and version.version,
        "digest": version and version.digest,
        "task": version and version.task,
        "config": side.config if version else None,
    }
