"""The command `bench`: how fast a running server answers."""

import asyncio
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from quickchange_client.async_client import AsyncQuickchange
from quickchange_client.cli.output import print_json_value, print_table
from quickchange_client.cli.session import JsonOption, UrlOption, session
from quickchange_client.closed_loop import LoadFigures, LoadPlan, percentile, run_load
from quickchange_client.errors import ArgumentInvalid, QuickchangeError

ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]…", help="Asked in turn; without any: the base alone."),
]
ClientsOption = Annotated[
    int, typer.Option("--clients", metavar="N", min=1, help="Requests under way at once.")
]
RequestsOption = Annotated[
    int, typer.Option("--requests", metavar="N", min=1, help="Requests of each client.")
]
WordsOption = Annotated[
    int, typer.Option("--prompt-words", metavar="N", min=1, help="Words of a prompt, all new.")
]
TokensOption = Annotated[
    int, typer.Option("--tokens", metavar="N", min=1, help="Tokens generated for each.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of the prompts.")]


def bench(
    models: ModelsArgument = None,
    clients: ClientsOption = 4,
    requests: RequestsOption = 4,
    prompt_words: WordsOption = 64,
    tokens: TokensOption = 64,
    seed: SeedOption = 0,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a running server: tokens per second, and how long callers wait.

    Streams greedy completions that ignore the end of text, in a closed loop:
    each client sends its next request when its last has ended. TTFT counts
    from the sending to the first text, ITL between two texts, TPOT is the
    mean per token after the first. Give another --seed to measure again
    without a prefix that the server still knows.

    Examples:
        quickchange bench

        quickchange bench sentiment legal --clients 16 --requests 2

        quickchange bench legal@candidate --tokens 16 --json
    """
    with session(url, as_json) as client:
        names = tuple(models or [client.models.list().data[0].id])
        plan = LoadPlan(names, clients, requests, prompt_words, tokens, seed)
        figures = asyncio.run(_measured(url, plan))
        if not all(each.num_tokens for each in figures.requests):
            raise ArgumentInvalid("a server without usage in its streams cannot be measured")
    shown = summary(plan, figures)
    print_json_value(shown) if as_json else _print(shown)


async def _measured(url: str | None, plan: LoadPlan) -> LoadFigures:
    """Warm up with one request of each model, then measure."""
    is_seen = sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=not is_seen, transient=True) as progress:
        bar = progress.add_task("Measuring", total=plan.num_clients * plan.num_requests)
        try:
            async with AsyncQuickchange(url) as client:
                warm = LoadPlan(plan.models, len(plan.models), 1, 4, 2, plan.seed - 1)
                await run_load(client, warm)
                return await run_load(client, plan, lambda: progress.advance(bar))
        except* QuickchangeError as errors:
            raise _first(errors) from errors


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def summary(plan: LoadPlan, figures: LoadFigures) -> dict[str, Any]:
    """Return the figures by name; times in milliseconds."""
    requests = figures.requests
    gaps = [gap for each in requests for gap in each.gaps_s]
    means = [each.tpot_s for each in requests if each.tpot_s is not None]
    return {
        "models": list(plan.models),
        "clients": plan.num_clients,
        "requests": len(requests),
        "prompt_tokens": sum(each.num_prompt_tokens for each in requests),
        "generated_tokens": sum(each.num_tokens for each in requests),
        "seconds": round(figures.seconds, 3),
        "tokens_per_s": round(figures.tokens_per_s, 1),
        "ttft_ms": _spread([each.ttft_s for each in requests]),
        "itl_ms": _spread(gaps),
        "tpot_ms": _spread(means),
        "e2e_ms": _spread([each.e2e_s for each in requests]),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {f"p{round(100 * s)}": round(1e3 * percentile(seconds, s), 1) for s in (0.5, 0.95, 0.99)}


def _print(shown: dict[str, Any]) -> None:
    print(
        f"{shown['requests']} requests by {shown['clients']} clients in {shown['seconds']} s: "
        f"{shown['tokens_per_s']} tokens/s out "
        f"({shown['prompt_tokens']} prompt tokens, {shown['generated_tokens']} generated)"
    )
    rows = [
        (name.removesuffix("_ms").upper(), *shown[name].values())
        for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
    ]
    print_table(("MILLISECONDS", ">P50", ">P95", ">P99"), rows)
