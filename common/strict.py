"""Strict settings: the base of every pydantic model here, one line for what is wrong with a value, arguments
of what a plan names, strict YAML.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.errors import PlanError
from common.names import ONE_LINE
from common.terminal import escaped, is_plain

MAX_SHOWN = 200
"""Characters of a wrong value in a message."""


class StrictModel(BaseModel):
    """Frozen, no unknown keys, no silent conversion between kinds of value, no NaN and no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def describe_validation(error: ValidationError) -> str:
    """One line for the first problem of a pydantic error: field, value, what was expected."""
    return _describe_problem(error.errors(include_url=False)[0])


def describe_all(error: ValidationError, *, values: bool = True) -> str:
    """One line for all problems of a pydantic error.

    Args:
        values: False leaves the values out: they may name patients.
    """
    problems = error.errors(include_url=False, include_input=values)
    return "; ".join(_describe_problem(problem) for problem in problems)


def _describe_problem(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if not field:
        return message
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{field}`"
    if problem["type"] == "missing":
        return f"`{field}` is missing"
    value = problem.get("input", {})
    shown = "" if isinstance(value, dict | list) else f" = {_shortened(repr(value))}"
    return f"`{field}`{shown}: {message}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def hidden_text(values: object) -> str | None:
    """What is wrong with the first key or text of a tree of JSON that is more than one line, or holds what
    `ONE_LINE` refuses; None where each is one line. The line feed behind a `question` stays.
    """
    waiting: list[object] = [values]
    while waiting:
        match waiting.pop():
            case dict() as mapping:
                waiting += mapping
                for key, value in mapping.items():
                    is_block = key == "question" and isinstance(value, str)
                    waiting.append(value.removesuffix("\n") if is_block else value)
            case list() as items:
                waiting += items
            case str() as text if not is_plain(text):
                shown = escaped(_shortened(text)).replace("\n", "\\n").replace("\t", "\\t")
                return f"a text is not one line of letters that can be seen: {shown}"
    return None


Scalar = bool | int | float | str
MAX_ARGUMENTS = 32


class Arguments(dict[str, Scalar]):
    """Name -> value, for a function that a plan names. Not to be changed: it is hashed with its plan, and
    `true` is not 1.
    """

    def _text(self) -> str:
        return json.dumps(self, sort_keys=True)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self._text())

    def __eq__(self, other: object) -> bool:
        return self._text() == Arguments(other)._text() if isinstance(other, dict) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other


NO_ARGUMENTS = Arguments()

PlanArguments = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")],
        bool | int | float | Annotated[str, Field(max_length=64, pattern=ONE_LINE)],
    ],
    Field(max_length=MAX_ARGUMENTS),
    AfterValidator(Arguments),
]
"""A small mapping in a plan; who uses it checks it with `checked_arguments`."""

PlanWeights = Annotated[
    dict[Annotated[str, Field(max_length=64, pattern=ONE_LINE)], Annotated[float, Field(gt=0, le=1000)]],
    Field(max_length=MAX_ARGUMENTS),
    AfterValidator(Arguments),
]
"""Name -> how much it counts."""


_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def checked_arguments(
    given: Mapping[str, Scalar], function: Callable[..., object], *, where: str, of: str, code: str
) -> dict[str, Any]:
    """The arguments, if `function` takes them as keywords of these types.

    Args:
        where: the key of the plan, such as `model.args`.
        of: what the plan calls the function.
        code: of the error.
    Raises:
        PlanError: names the first that is unknown or has a wrong value, and those that are known.
    """
    known = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        and (parameter.annotation in _WORDS or get_origin(parameter.annotation) is Literal)
    }
    for name, value in given.items():
        if name not in known:
            hint = f"known: {', '.join(known)}" if known else f"{of} has none"
            raise PlanError(f"{where}.{name} is unknown to {of}", code=code, hint=hint)
        if not _is_value_of(value, known[name]):
            raise PlanError(
                f"{where}.{name} = {value!r}: must be {_words_for(known[name])}",
                code=code,
                hint=f"known: {', '.join(known)}",
            )
    return {name: float(value) if known[name] is float else value for name, value in given.items()}


def _is_value_of(value: Scalar, annotation: Any) -> bool:
    """Whether a value is of a type; nothing is converted, but a whole number may stand for a float."""
    if get_origin(annotation) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(annotation))
    return type(value) is annotation or (annotation is float and type(value) is int)


def _words_for(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(one) for one in get_args(annotation))
    return _WORDS[annotation]


MAX_YAML_BYTES = 64 << 10
"""Of a plan, a policy, a site.yaml, ...: what people write by hand."""
_MAX_INTEGER = 2**63


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number (YAML 1.1 reads it as text), and refuses a key given twice, keys
    that are no words, aliases (a few of them make gigabytes of a few bytes) and integers beyond 64 bits.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases are not read", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not a plain word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", node.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if abs(number) >= _MAX_INTEGER:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return number

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        text.encode()  # half of a character, as in "\\uD800", can be written nowhere
        return text


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _StrictLoader.construct_yaml_str)


def strict_yaml(text: str | bytes, *, limit: int = MAX_YAML_BYTES) -> Any:
    """The content of a YAML document.

    Args:
        limit: bytes, or characters of a decoded text; more is refused before it is parsed.
    Raises:
        yaml.YAMLError: whatever is wrong with it; nothing else is raised.
    """
    if len(text) > limit:
        raise yaml.YAMLError(f"larger than {limit} bytes")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, ArithmeticError, TypeError, LookupError, AttributeError, MemoryError) as error:
        # PyYAML lets through what int, date and chr say of !!int abc, 2026-99-99, "\\UFFFFFFFF"
        raise yaml.YAMLError(f"a value cannot be read: {str(error)[:100]}") from None


def read_yaml(path: Path, *, limit: int = MAX_YAML_BYTES) -> Any:
    """The content of a YAML file, of which no more than `limit` bytes are read.

    Raises:
        OSError: it cannot be read.
        yaml.YAMLError: see `strict_yaml`; also where it is not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    return strict_yaml(content, limit=limit)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(values: Any, **options: Any) -> str:
    """YAML that `strict_yaml` reads: a list that occurs twice is written twice, not as an alias.

    Args:
        options: of `yaml.dump`.
    """
    text: str = yaml.dump(values, Dumper=_PlainDumper, **options)
    return text


def describe_yaml(error: yaml.YAMLError) -> str:
    """One line: the problem, and where it is."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    said = " ".join(str(problem or error).split())[:200]
    return said if mark is None else f"line {mark.line + 1}: {said}"
