"""From training to rolling back, in one script.

Train two versions of a task with PEFT, push them, call them, move the alias, compare, roll back:

    quickchange serve &
    python examples/train_and_roll_out.py "$(quickchange base path)"

Both versions learn whether a review is positive: the first for too short a time, the second long
enough. Every step is checked; the script ends with 1 when one does not hold.
"""

import argparse
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from quickchange_adapters.task import Task
from quickchange_client import AdapterVersion, NotFound, Quickchange
from quickchange_client.comparison import AskOptions, compare_norms, compare_outputs, read_side
from tiny_trainer import Recipe, Row, train_adapter

TASK = Task(prompt="Review: {input}", max_tokens=8, temperature=0.0)
ROWS: list[Row] = [
    ("A wonderful film, warm and funny.", "positive"),
    ("I would gladly watch it twice.", "positive"),
    ("The best hour of my week.", "positive"),
    ("Great acting and a great end.", "positive"),
    ("Dull from the first minute.", "negative"),
    ("An hour that I will never get back.", "negative"),
    ("The worst film of the year.", "negative"),
    ("Weak jokes and a weak end.", "negative"),
]


def main() -> None:
    """Run all steps, and clean up."""
    options = parsed_options()
    with (
        tempfile.TemporaryDirectory() as folder,
        Quickchange(options.url, api_key=options.api_key) as client,
    ):
        try:
            roll_out(client, options, Path(folder))
        finally:
            if not options.keep:
                remove(client, options.name)


def remove(client: Quickchange, name: str) -> None:
    """Delete the adapter, if it came to be there."""
    with suppress(NotFound):
        client.adapters.delete(name)


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path, help="the folder that `quickchange base path` prints")
    parser.add_argument("--url", help="the server's address (default: QUICKCHANGE_URL)")
    parser.add_argument("--api-key", help="default: QUICKCHANGE_API_KEY")
    parser.add_argument("--name", default="film-reviews", help="what the adapter will be called")
    parser.add_argument("--steps", type=int, default=20, help="of the second training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep", action="store_true", help="leave the adapter on the server")
    return parser.parse_args()


def roll_out(client: Quickchange, options: argparse.Namespace, folder: Path) -> None:
    """Train, push, call, move the alias, compare, roll back."""
    name = options.name
    say("1. train and push a first version: it is live at once")
    first = train_and_push(client, options, folder / "first", num_steps=2)
    check(answered_by(client, name) == first.digest, "the bare name means the first version")

    say("2. train and push a better one: it waits until an alias moves")
    second = train_and_push(client, options, folder / "second", num_steps=options.steps)
    check(answered_by(client, name) == first.digest, "the first version is still live")
    candidate = f"{name}:{second.version}"
    check(answered_by(client, candidate) == second.digest, "the second can be called by number")

    say("3. compare them")
    num_right = compare(client, name, candidate)
    check(num_right[1] > num_right[0], f"the second is better: {num_right[1]} to {num_right[0]}")

    say("4. move the alias, unless somebody else changed the adapter meanwhile")
    seen = client.adapters.get(name)
    client.adapters.set_alias(name, "default", second.version, if_match=seen.meta.etag)
    check(answered_by(client, name) == second.digest, "the second version is live")

    say("5. roll back")
    client.adapters.rollback(name)
    check(answered_by(client, name) == first.digest, "the first version is live again")


def train_and_push(
    client: Quickchange, options: argparse.Namespace, folder: Path, *, num_steps: int
) -> AdapterVersion:
    """Train a version and push it; print the server's report in a line."""
    recipe = Recipe(TASK, num_steps, learning_rate=options.learning_rate)
    loss = train_adapter(options.base, ROWS, recipe, folder)
    version = client.adapters.upload(folder, name=options.name)
    report = version.report
    matched = len(report.modules.matched) if report else 0
    say(f"   {version.name}:{version.version} loss {loss:.3f}, {matched} modules match the base")
    return version


def answered_by(client: Quickchange, model: str) -> str | None:
    """Ask something; return the digest of the version that answered."""
    answer = client.chat(model, ROWS[0][0])
    say(f"   {model}: {answer.text!r}")
    return answer.meta.adapter_digest


def compare(client: Quickchange, a: str, b: str) -> tuple[int, int]:
    """Ask both versions every review; return how many answers of each are right."""
    sides = (read_side(client, a), read_side(client, b))
    outputs = compare_outputs(client, sides, [text for text, _ in ROWS], AskOptions())
    total = compare_norms(*sides)[-1]
    say(f"   norm of the update: {total.a:.3g} and {total.b:.3g}")
    right = [
        (o.a.text == label, o.b.text == label) for o, (_, label) in zip(outputs, ROWS, strict=True)
    ]
    return sum(a for a, _ in right), sum(b for _, b in right)


def check(is_so: bool, sentence: str) -> None:
    """Print what was to be seen; end the script when it was not."""
    say(f"   {'ok' if is_so else 'NOT SO'}: {sentence}")
    if not is_so:
        sys.exit(1)


def say(sentence: str) -> None:
    """Print a sentence at once."""
    print(sentence, flush=True)


if __name__ == "__main__":
    main()
