"""Strict settings: the base of every pydantic model here, one line for what is wrong with a value, strict
YAML.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


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
    shown = "" if isinstance(value, dict | list) else f" = {value!r}"
    return f"`{field}`{shown}: {message}"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number (YAML 1.1 reads it as text) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = [key.value for key, _ in node.value]
        for key in seen:
            if seen.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def strict_yaml(text: str | bytes) -> Any:
    """The content of a YAML document; raises yaml.YAMLError for what it refuses."""
    return yaml.load(text, Loader=_StrictLoader)
