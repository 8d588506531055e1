"""The command `generate`: a prompt in, text out as it comes."""

import sys
from typing import Annotated

import typer

from quickchange_client.cli.mix import base_of, parse_mix
from quickchange_client.cli.output import print_json, without_controls
from quickchange_client.cli.session import JsonOption, UrlOption, say, session
from quickchange_client.client import Quickchange
from quickchange_client.errors import ArgumentInvalid
from quickchange_client.generation import ChatChunk, Completion, GenerationOptions
from quickchange_client.stream import Stream

MODEL_HELP = "The base, or an adapter: NAME, NAME:3, NAME@ALIAS or NAME@sha256:DIGEST."
MIX_HELP = "Mix adapters on the base, as in a=0.7,b=-0.3; MODEL may then be left out."

ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
PromptArgument = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")
]
AdaptersOption = Annotated[
    str | None, typer.Option("--adapters", metavar="NAME=WEIGHT,…", help=MIX_HELP)
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Continue the prompt as plain text, without a chat.")
]
RawPromptOption = Annotated[
    bool, typer.Option("--raw-prompt", help="Leave the adapter's task.json aside.")
]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="Most tokens to generate.")
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 is greedy.")
]
TopPOption = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Nucleus.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Makes sampling repeatable.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End here; repeatable.")
]


def generate(
    model: ModelArgument = None,
    prompt: PromptArgument = None,
    adapters: AdaptersOption = None,
    raw: RawOption = False,
    raw_prompt: RawPromptOption = False,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text and stream it to the terminal.

    What is left out is filled from the task.json that came with the adapter,
    if one did: its prompt form, its system message, its defaults.

    Examples:
        quickchange generate sentiment "A wonderful film."

        quickchange generate smollm2-135m "Tell me of the sea." --max-tokens 80 --temperature 0

        quickchange generate smollm2-135m "Once upon a time" --raw --max-tokens 40

        quickchange generate sentiment "A wonderful film." --raw-prompt

        quickchange generate --adapters sentiment=0.7,reviews=0.3 "The film was" --raw

        cat review.txt | quickchange generate sentiment@canary --json
    """
    options: GenerationOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "raw_prompt": raw_prompt or None,
    }
    with session(url, as_json) as client:
        if raw and system is not None:
            raise ArgumentInvalid("--system belongs to a chat; leave out --system or --raw")
        if adapters is not None:
            options["adapters"] = parse_mix(adapters)
        asked, text = _asked(client, model, prompt, is_mix=adapters is not None)
        given = text if raw else _messages(text, system)
        if as_json:
            _print_whole(client, asked, given, options)
        else:
            _print_stream(_open(client, asked, given, options))


def _asked(
    client: Quickchange, model: str | None, prompt: str | None, *, is_mix: bool
) -> tuple[str, str]:
    """Return the model and the text; of a mix, a single word is the prompt."""
    if is_mix and prompt is None:
        model, prompt = base_of(client), model
    if model is None:
        raise ArgumentInvalid("name a MODEL, or adapters to mix: --adapters a=0.7,b=0.3")
    return model, sys.stdin.read() if prompt in (None, "-") else str(prompt)


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": text}]


def _print_whole(
    client: Quickchange, model: str, given: str | list[dict[str, str]], options: GenerationOptions
) -> None:
    if isinstance(given, str):
        print_json(client.complete(model, given, **options))
    else:
        print_json(client.chat(model, given, **options))


def _open(
    client: Quickchange, model: str, given: str | list[dict[str, str]], options: GenerationOptions
) -> Stream[Completion] | Stream[ChatChunk]:
    if isinstance(given, str):
        return client.stream_complete(model, given, **options)
    return client.stream_chat(model, given, **options)


def _print_stream(stream: Stream[Completion] | Stream[ChatChunk]) -> None:
    """Print text as it comes; on a terminal, without what could steer it."""
    clean = without_controls if sys.stdout.isatty() else str
    finish_reason = None
    with stream:
        for chunk in stream:
            sys.stdout.write(clean(chunk.text))
            sys.stdout.flush()
            for choice in chunk.choices:
                finish_reason = choice.finish_reason or finish_reason
    print(flush=True)
    if finish_reason == "length":
        say("(cut off at the limit of tokens; raise it with --max-tokens)")
