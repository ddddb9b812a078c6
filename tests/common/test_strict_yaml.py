"""Files that others wrote: whatever is in them, one line says what is wrong, soon and in little memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.inclusion import read_rules
from client.node.process import read_node
from client.simulation.injection import read_map
from client.site.config import read_site
from client.site.enrolment import existing_cohort
from client.site.policy import read_policy
from client.supervision.preflight import coordinator_address
from common.errors import ConfigError
from common.plan import read_plan
from common.strict import MAX_YAML_BYTES, dump_yaml, read_yaml, strict_yaml
from server.federation.registry import Federation


def alias_bomb(levels: int) -> bytes:
    """Each level holds the one before nine times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


ATTACKS = {
    "aliases that multiply": alias_bomb(7),
    "one alias": b"name: &x first\nquestion: *x\n",
    "an alias to itself": b"name: &x [*x]\n",
    "a day that is none": b"name: 2026-99-99\n",
    "a tag on a word": b"name: !!int abc\n",
    "a tag on a list": b"name: !!float [1]\n",
    "bytes that are none": b"name: !!binary a\n",
    "pairs that are none": b"name: !!omap [1]\n",
    "a time that is none": b"name: !!timestamp soon\n",
    "a number of 50 000 digits": b"seed: " + b"9" * 50_000 + b"\n",
    "a number of 200 000 digits": b"seed: " + b"9" * 200_000 + b"\n",
    "a long hexadecimal number": b"max_rounds: 0x" + b"f" * 50_000 + b"\n",
    "a long number of base 60": b"max_rounds: " + b":".join([b"59"] * 20_000) + b"\n",
    "half a character": b'name: "\\uD800"\n',
    "no character": b'name: "\\UFFFFFFFF"\n',
    "a key that is a list": b"? [a, b]\n: 1\n",
    "a merged mapping": b"<<: {name: x}\nname: y\n",
    "a key twice": b"name: x\nname: y\n",
    "many keys twice": b"".join(b"k%d: 1\n" % n for n in range(5000)) + b"k1: 1\n",
    "deep lists": b"name: " + b"[" * 30_000,
    "code": b"name: !!python/object/apply:os.system ['true']\n",
    "no UTF-8": b"name: \xff\xfe\n",
    "control characters": b"name: \x00\x01\n",
    "much": b"# " + b"x" * (2 * MAX_YAML_BYTES),
    "a list": b"- 1\n- 2\n",
    "a word": b"hello\n",
    "a number": b"5\n",
}
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "plan": ("plan.yaml", read_plan),
    "policy": ("policy.yaml", read_policy),
    "site": ("site.yaml", read_site),
    "cohort": ("cohort.yaml", lambda path: read_rules(path.parent)),
    "node": ("node.yaml", lambda path: read_node(path.parent)),
    "address": ("node.yaml", lambda path: coordinator_address(path.parent)),
    "federation": ("federation.yaml", lambda path: Federation.open(path.parent)),
    "map": ("map.yaml", read_map),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_reader_of_yaml_refuses_with_one_short_line(tmp_path: Path, attack: str, reader: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(ATTACKS[attack])
    if (attack, reader) == ("much", "cohort"):  # a list of patients may stand there
        return
    began = time.process_time()
    with pytest.raises(ConfigError) as refused:
        read(tmp_path / name)
    assert time.process_time() - began < 10
    assert refused.value.code in {f"bad-{reader}", "bad-node"}
    assert len(refused.value.message) < 1000 + len(str(tmp_path))
    assert "\n" not in refused.value.message


def test_a_bomb_of_aliases_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(yaml.YAMLError, match="aliases"):
            strict_yaml(alias_bomb(9))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("attack", ATTACKS)
def test_site_init_survives_the_cohort_file_that_it_finds(tmp_path: Path, attack: str) -> None:
    (tmp_path / "cohort.yaml").write_bytes(ATTACKS[attack])
    assert isinstance(existing_cohort(tmp_path), dict)


@settings(max_examples=100)
@given(st.text(alphabet=" \n:-[]{}&*!'\"?|>%@`#,ax01.e~<=\\U", max_size=80) | st.binary(max_size=60))
def test_nothing_but_a_yaml_error_comes_out(text: str | bytes) -> None:
    try:
        strict_yaml(text)
    except yaml.YAMLError:
        return


def test_a_file_is_read_no_further_than_the_limit() -> None:
    with pytest.raises(yaml.YAMLError, match="larger than"):
        read_yaml(Path("/dev/zero"))


def test_numbers_of_64_bits_are_read() -> None:
    assert strict_yaml(f"a: {2**63 - 1}\nb: -{2**63 - 1}\nc: 0x7f\nd: 1e-5") == {
        "a": 2**63 - 1,
        "b": 1 - 2**63,
        "c": 127,
        "d": 1e-5,
    }


def test_what_we_write_has_no_alias() -> None:
    shared = ["metal"]
    assert strict_yaml(dump_yaml({"a": shared, "b": {"c": shared}})) == {"a": shared, "b": {"c": shared}}
