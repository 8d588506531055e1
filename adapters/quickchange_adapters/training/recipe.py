"""What a training run is to do, as plain data, read from a TOML file. Knows no torch.

Every key that is not known is an error that names the nearest one that is. `LORA_RANK` and
`LORA_ALPHA` in the environment override the file.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quickchange_adapters.errors import RecipeInvalid
from quickchange_adapters.task import Task, read_task
from quickchange_adapters.training.toml_table import TomlTable, read_toml

METHODS = ("lora", "dora", "vera", "adalora")
FORMS = ("chat", "completion")
BASE_BITS = (16, 8, 4)
BASE_STORAGES = ("dense", "bitsandbytes")
NUMBER_FORMATS = ("bfloat16", "float32")
METRICS = ("loss", "accuracy", "style", "form")
ALL_LINEAR = "all-linear"
ATTENTION = "attention"
DEFAULT_BASE = "builtin:smollm2-135m"
MAX_RANK = 4096
RANK_VARIABLE = "LORA_RANK"
ALPHA_VARIABLE = "LORA_ALPHA"


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Where rows are, and which of their fields are input and answer.

    Without a `validation` file that share of the training rows is held out for it.
    """

    train: Path
    validation: Path | None = None
    test: Path | None = None
    input: str = "input"
    answer: str = "answer"
    validation_share: float = 0.1
    max_rows: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Which matrices are learned, and how the result is written.

    Attributes:
        targets: `all-linear`, `attention`, or names of modules.
        frozen_a: only B is learned (LoRA-FA, arXiv 2308.03303).
        number_format: of the weights' file.
        base_name: written as `base_model_name_or_path`.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0
    rslora: bool = False
    frozen_a: bool = False
    number_format: str = "bfloat16"
    base_name: str | None = None
    allow_unserved: bool = False


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How the loop goes through the rows.

    Attributes:
        learning_rate_b: of the B matrices (LoRA+, arXiv 2402.12354); None: as the others.
        validate_every: steps between two looks at the validation rows; None: four an epoch, and
            twenty a run at most.
        patience: so many looks without a better loss end the run.
        pack_tokens: rows are computed in packs of about this many tokens; bounds memory.
        compute: number format of the forward pass; `auto` takes what the processor does fast.
    """

    epochs: float = 2.0
    batch_rows: int = 16
    learning_rate: float = 5e-4
    learning_rate_b: float | None = None
    max_length: int = 512
    max_steps: int | None = None
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    validate_every: int | None = None
    patience: int = 4
    pack_tokens: int = 1024
    compute: str = "auto"


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How base and adapter are compared on the test rows.

    Attributes:
        base_prompt: the form that the base alone is asked in, since nobody told it the task.
        form: for the metric `form`: a regular expression that a right answer matches whole.
        name_field: for the metric `form`: the field whose words the answer must name.
    """

    metric: str = "loss"
    max_rows: int = 200
    samples: int = 5
    base_prompt: str | None = None
    form: str | None = None
    name_field: str | None = None
    word_baseline: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run. `output` is the folder that its files go to.

    `base_storage`: what holds a base of fewer than 16 bits; dense is rounded and as large as ever.
    """

    file: Path
    output: Path
    data: DataSettings
    task: Task = field(default_factory=Task)
    base: str = DEFAULT_BASE
    base_bits: int = 16
    base_storage: str = "dense"
    form: str = "chat"
    seed: int = 0
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def read_recipe(file: Path, environ: Mapping[str, str] = os.environ) -> Recipe:
    """Read a recipe. Paths in it are relative to its own folder.

    Raises: RecipeInvalid with every problem found.
    """
    return recipe_from(file, read_toml(file), environ)


def recipe_from(file: Path, values: dict[str, Any], environ: Mapping[str, str]) -> Recipe:
    """Read what a recipe's file holds, or what a sweep made of it.

    Raises: RecipeInvalid with every problem found.
    """
    reader = _Reader(file, TomlTable(values, "", []))
    recipe = reader.read(environ)
    if reader.problems:
        raise RecipeInvalid(str(file), reader.problems)
    return recipe


class _Reader:
    def __init__(self, file: Path, root: TomlTable) -> None:
        self._file = file
        self._folder = file.parent
        self._root = root
        self.problems = root.problems

    def read(self, environ: Mapping[str, str]) -> Recipe:
        root = self._root
        recipe = Recipe(
            file=self._file,
            output=self._folder / root.text("output", "."),
            base=root.text("base", DEFAULT_BASE),
            base_bits=root.number_choice("base_bits", 16, BASE_BITS),
            base_storage=root.choice("base_storage", "dense", BASE_STORAGES),
            form=root.choice("form", "chat", FORMS),
            seed=root.count("seed", 0, 0, (1 << 31) - 1),
            data=self._data(root.table("data")),
            task=self._task(),
            adapter=self._adapter(root.table("adapter"), environ),
            loop=self._loop(root.table("training")),
            evaluation=self._evaluation(root.table("evaluation")),
        )
        root.finish()
        self._check_together(recipe)
        return recipe

    def _data(self, table: TomlTable) -> DataSettings:
        files = {key: table.text(key, None) for key in ("train", "validation", "test")}
        if files["train"] is None and not table.has("train"):
            table.refuse("train", "is missing: name the file of training rows")
        paths = {key: self._folder / name if name else None for key, name in files.items()}
        settings = DataSettings(
            train=paths.pop("train") or self._folder,
            **paths,
            input=table.text("input", "input"),
            answer=table.text("answer", "answer"),
            validation_share=table.number("validation_share", 0.1, 0.01, 0.5),
            max_rows=table.count("max_rows", None, 1, 1 << 31),
        )
        table.finish()
        return settings

    def _task(self) -> Task:
        """Read the table `task` as the task.json that it becomes."""
        raw = self._root.value("task")
        if raw is None:
            return Task()
        if not isinstance(raw, dict):
            self.problems.append("task must be a table, such as [task]")
            return Task()
        import json

        reading = read_task(json.dumps(raw, default=str).encode())
        for each in reading.problems:
            hint = f" ({each.hint})" if each.hint else ""
            self.problems.append(f"{each.where}: {each.message}{hint}")
        return reading.task or Task()

    def _adapter(self, table: TomlTable, environ: Mapping[str, str]) -> AdapterSettings:
        rank = table.count("rank", 8, 1, MAX_RANK)
        rank = int(self._from_environ(environ, RANK_VARIABLE, rank, whole=True))
        settings = AdapterSettings(
            method=table.choice("method", "lora", METHODS),
            rank=rank,
            alpha=self._from_environ(
                environ, ALPHA_VARIABLE, table.number("alpha", 2.0 * rank, 1e-3, 1e6)
            ),
            targets=self._targets(table),
            dropout=table.number("dropout", 0.0, 0.0, 0.9),
            rslora=table.flag("rslora", False),
            frozen_a=table.flag("frozen_a", False),
            number_format=table.choice("number_format", "bfloat16", NUMBER_FORMATS),
            base_name=table.text("base_name", None),
            allow_unserved=table.flag("allow_unserved", False),
        )
        table.finish()
        return settings

    def _from_environ(
        self, environ: Mapping[str, str], name: str, value: float, whole: bool = False
    ) -> float:
        text = environ.get(name)
        if not text:
            return value
        try:
            found = float(int(text)) if whole else float(text)
        except ValueError:
            found = 0.0
        if 0 < found <= (MAX_RANK if whole else 1e6):
            return found
        wanted = f"a whole number from 1 to {MAX_RANK}" if whole else "a number above 0"
        self.problems.append(f"the variable {name} is {text[:40]!r}, but must be {wanted}")
        return value

    def _targets(self, table: TomlTable) -> str | tuple[str, ...]:
        value = table.value("targets")
        if value is None or value in (ALL_LINEAR, ATTENTION):
            return value or ALL_LINEAR
        if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
            return tuple(value)
        wanted = f'"{ALL_LINEAR}", "{ATTENTION}" or a list of names of modules'
        table.refuse("targets", f"is {value!r}, but must be {wanted}")
        return ALL_LINEAR

    def _loop(self, table: TomlTable) -> LoopSettings:
        settings = LoopSettings(
            epochs=table.number("epochs", 2.0, 0.01, 1000),
            batch_rows=table.count("batch_rows", 16, 1, 4096),
            learning_rate=table.number("learning_rate", 5e-4, 1e-8, 10),
            learning_rate_b=table.number("learning_rate_b", None, 1e-8, 10),
            max_length=table.count("max_length", 512, 2, 1 << 20),
            max_steps=table.count("max_steps", None, 1, 1 << 31),
            warmup_share=table.number("warmup_share", 0.05, 0, 1),
            weight_decay=table.number("weight_decay", 0.0, 0, 1),
            max_grad_norm=table.number("max_grad_norm", 1.0, 1e-3, 1e6),
            gradient_checkpointing=table.flag("gradient_checkpointing", False),
            validate_every=table.count("validate_every", None, 1, 1 << 31),
            patience=table.count("patience", 4, 1, 1 << 31),
            pack_tokens=table.count("pack_tokens", 1024, 16, 1 << 20),
            compute=table.choice("compute", "auto", ("auto", *NUMBER_FORMATS)),
        )
        table.finish()
        return settings

    def _evaluation(self, table: TomlTable) -> EvaluationSettings:
        settings = EvaluationSettings(
            metric=table.choice("metric", "loss", METRICS),
            max_rows=table.count("max_rows", 200, 1, 1 << 31),
            samples=table.count("samples", 5, 1, 100),
            base_prompt=table.text("base_prompt", None),
            form=table.text("form", None),
            name_field=table.text("name_field", None),
            word_baseline=table.flag("word_baseline", False),
        )
        table.finish()
        return settings

    def _check_together(self, recipe: Recipe) -> None:
        if recipe.form == "completion" and recipe.task.system is not None:
            self.problems.append('task.system has no place in form "completion": use form "chat"')
        if recipe.adapter.frozen_a and recipe.adapter.method not in ("lora", "dora"):
            self.problems.append(f"adapter.frozen_a does not go with {recipe.adapter.method!r}")
        if recipe.adapter.rslora and recipe.adapter.method not in ("lora", "dora"):
            self.problems.append(f"adapter.rslora does not go with {recipe.adapter.method!r}")


def with_output(recipe: Recipe, output: Path | None) -> Recipe:
    """Return the recipe with another folder for its files; the same one for None."""
    return recipe if output is None else replace(recipe, output=output)
