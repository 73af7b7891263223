"""Files of responses: every line once and in the end in order, whatever the stops, and nothing foreign is touched."""

import contextlib
import json
import math

import numpy as np
import pytest

from qsharp_jax.cli import generated as output_file
from qsharp_jax.cli.generated import Request
from qsharp_jax.decoding import Generation
from qsharp_jax.system.errors import UserError

SETTINGS = {"ref": "a", "guide": ["b"], "temperature": 1.0, "stop_ids": [1, 2], "weights": None}
PROMPTS = [("Sam\u2028has", 0.1), ("Sam\u2028has", None), ('"Mia"', 0.1), ("日本", 0.1)]
REQUESTS = [Request(prompt, {}, eta, 7 * place) for place, (prompt, eta) in enumerate(PROMPTS * 3)]
GENERATION = Generation(
    tokens=np.asarray([[5, 6, 0], [7, 1, 9]]),
    lengths=np.asarray([2, 3]),
    finished=np.asarray([False, True]),
    dropped=np.zeros(2),
    log_probs=np.asarray([[-0.5, -math.inf, 0], [-1 / 3, -2, -3]]),
    ref_log_probs=np.asarray([[-0.5, -0.25, 0], [-1, -2, -3]]),
    kl=np.asarray([[0.5, 1, 0], [math.nan, 0, 0]]),
    kl_truncated=np.zeros((2, 3)),
    values=np.asarray([[math.nan, 0.5, math.nan], [1, 1, 1]]),
)


def make_line(place: int) -> str:
    return output_file.encode(REQUESTS[place], f"response {place}\u2029", GENERATION, place % 2, SETTINGS)


WHOLE = "".join(map(make_line, range(len(REQUESTS)))).encode()
ORDER = [3, 0, 1, 2, 11, 4, 10, 5, 9, 6, 8, 7]  # in which the responses end


def generate(path, *, until: int | None = None) -> list[int]:
    """Do what the command does, with responses that need no model: the places that it makes, before it is stopped."""
    generated = []

    def lines(missing):
        for place in sorted(missing, key=ORDER.index):
            if len(generated) == until:
                raise KeyboardInterrupt
            generated.append(place)
            yield place, make_line(place)

    with contextlib.suppress(KeyboardInterrupt):
        output_file.write(path, REQUESTS, SETTINGS, lines)
    return generated


def test_a_line_is_strict_json_without_what_lies_past_the_end():
    first, second = (json.loads(make_line(place), parse_constant=pytest.fail) for place in (0, 1))
    assert first == {
        "prompt": "Sam\u2028has", "response": "response 0\u2029", "tokens": [5, 6], "finished": False, "eta": 0.1,
        "seed": 0, "log_probs": [-0.5, None], "ref_log_probs": [-0.5, -0.25], "kl": [0.5, 1.0], "values": [None, 0.5],
        "settings": SETTINGS,
    }  # fmt: skip
    assert second["log_probs"] == [-0.333333, -2, -3] and second["kl"] == [None, 0, 0] and second["finished"]


def test_lines_in_order_come_as_soon_as_those_before_them():
    came = []

    def ending():
        for place in (2, 0, 1, 4, 3):
            yield place, f"line {place}"
            came.append(place)

    order = [(line, len(came)) for line in output_file.in_order(ending())]
    assert order == [("line 0", 1), ("line 1", 2), ("line 2", 2), ("line 3", 4), ("line 4", 4)]


def test_a_file_grows_as_responses_end_and_is_in_order_at_the_end(tmp_path):
    path = tmp_path / "out.jsonl"
    assert generate(path, until=5) == ORDER[:5]
    assert path.read_bytes() == "".join(make_line(place) for place in ORDER[:5]).encode()
    assert generate(path) == ORDER[5:]
    assert path.read_bytes() == WHOLE
    assert generate(path) == [] and path.read_bytes() == WHOLE


@pytest.mark.parametrize("kept", [0, 1, 9, 11, 40, 700, 2000, -2, -1])
def test_a_file_cut_anywhere_ends_as_one_that_never_was(tmp_path, kept):
    path = tmp_path / "out.jsonl"
    cut = "".join(map(make_line, ORDER)).encode()[:kept]
    path.write_bytes(cut)
    assert generate(path) == ORDER[cut.count(b"\n") :]
    assert path.read_bytes() == WHOLE


def test_each_line_is_in_the_file_when_the_next_response_is_waited_for(tmp_path):
    path, sizes = tmp_path / "out.jsonl", []

    def lines(missing):
        for place in missing:
            sizes.append(path.stat().st_size)
            yield place, make_line(place)

    assert output_file.write(path, REQUESTS, SETTINGS, lines) == 0
    assert sizes == [len("".join(map(make_line, range(place))).encode()) for place in range(len(REQUESTS))]
    whole = path.read_bytes()
    assert output_file.write(path, REQUESTS, SETTINGS, iter) == len(REQUESTS)  # of nothing that is missing
    assert path.read_bytes() == whole


def test_a_file_to_which_another_process_writes_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"

    def lines(missing):
        with pytest.raises(UserError, match=f"another process writes to {path}; wait for it to end"):
            output_file.write(path, REQUESTS, SETTINGS, pytest.fail)
        yield from ((place, make_line(place)) for place in missing)

    output_file.write(path, REQUESTS, SETTINGS, lines)
    assert path.read_bytes() == WHOLE


def test_requests_that_are_alike_are_all_answered(tmp_path):
    path = tmp_path / "out.jsonl"
    requests = [REQUESTS[0], REQUESTS[1], REQUESTS[0]]
    path.write_text(make_line(0), encoding="utf-8")
    answered = []
    assert output_file.write(path, requests, SETTINGS, lambda missing: answered.extend(missing) or ()) == 1
    assert answered == [1, 2]
    path.write_text(make_line(0) * 2, encoding="utf-8")
    answered.clear()
    assert output_file.write(path, requests, SETTINGS, lambda missing: answered.extend(missing) or ()) == 2
    assert answered == [1]


def test_sorting_replaces_what_a_link_refers_to(tmp_path):
    path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    path.touch()
    link.symlink_to(path)
    generate(link)
    assert link.is_symlink() and path.read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (make_line(0) + make_line(0), "line 2, is not a response that this command lacks"),
        (make_line(0).replace("Sam", "Mia"), "line 1, is not a response that this command lacks"),
        (make_line(1) + make_line(1).replace('"seed": 7', '"seed": 8'), "line 2, is not a response that this command"),
        (make_line(1).replace('"eta": null', '"eta": 0.5'), "line 1, is not a response that this command lacks"),
        (
            make_line(0) + make_line(1).replace('"temperature": 1.0', '"temperature": 0.7'),
            "line 2, was generated with temperature 0.7, and this command has 1.0",
        ),
        (make_line(0).replace('["b"]', "null"), 'with guide null, and this command has ["b"]; give another --output'),
        (make_line(0).replace('"ref": "a"', '"ref": "a", "mode": "cd"'), 'mode "cd", and this command has null'),
        (make_line(0).replace('"Sam\u2028has"', '["a"]'), "line 1, is not a response that this"),
        (make_line(0) + '{"prompt": "a", "response": "b"}\n', "line 2, is not of `qsharp generate`"),
        (make_line(0) + make_line(1)[:50] + "\n" + make_line(2), "line 2, is not of `qsharp generate`"),
        ("[1]\n", "line 1, is not of"),
        ("7\n", "line 1, is not of"),
        ("\n", "line 1, is not of"),
        ("notes\n", "line 1, is not of"),
        ("notes without an end", "ends with a line that is not of `qsharp generate`"),
        (make_line(0) + "7", "ends with a line that is not of `qsharp generate`"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content, words):
    path = tmp_path / "out.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        output_file.write(path, REQUESTS, SETTINGS, pytest.fail)
    assert words in str(refusal.value) and str(path) in str(refusal.value)
    assert path.read_text(encoding="utf-8") == content
