"""The logits processor for vLLM, driven as vLLM's two model runners drive it, against one request at a time.

vLLM itself is not needed: `Runner` does to rows what its InputBatch does. benchmarks/vllm_guidance.py runs vLLM.
"""

import enum
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hf_folders import GPT2, LLAMA, guide

from qsharp_jax.models import hf

torch = pytest.importorskip("torch", reason="the processor is for PyTorch, which the test extra installs")

from qsharp_jax.integrations import vllm  # noqa: E402
from qsharp_jax.integrations.transformers import GuidanceLogitsProcessor, Guide  # noqa: E402

V, K = 23, 4
SETTINGS = [  # of requests
    None,
    dict(eta=0.1, guide="short"),
    dict(eta=0.5, guide="short", others="prefix"),
    dict(eta=0.2, guide=["short", "kind"], weights=[0.7, -0.3]),
    dict(eta=0.05, guide="short"),
]
Direction = enum.Enum("MoveDirectionality", ["UNIDIRECTIONAL", "SWAP"])


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    root = tmp_path_factory.mktemp("guides")
    hf.export_guide(guide(LLAMA), root / "short")
    hf.export_guide(guide(GPT2, distribution="categorical", atoms=(0.0, 0.3, 1.0)), root / "kind")
    return {name: str(root / name) for name in ("short", "kind")}


@pytest.fixture(scope="module")
def loaded(guides):
    return {name: Guide.from_pretrained(folder) for name, folder in guides.items()}


@pytest.fixture
def plugin(guides, monkeypatch):
    """The module, with the guides in the environment."""
    monkeypatch.setenv("QSHARP_GUIDES", ",".join(f"{name}={folder}" for name, folder in guides.items()))
    vllm.folders.cache_clear()
    yield vllm
    vllm.folders.cache_clear()


def config(**changes):
    model = dict(max_model_len=32, enable_prompt_embeds=False, logits_processors=None)
    return SimpleNamespace(
        speculative_config=changes.pop("speculative", None),
        scheduler_config=SimpleNamespace(async_scheduling=changes.pop("async_scheduling", False)),
        model_config=SimpleNamespace(**model | changes),
    )


def sampling(extra):
    extra = extra and {"top_k_candidates": K} | extra
    return SimpleNamespace(extra_args=extra, temperature=0.7 if extra else 0.0)


def one_at_a_time(loaded, tokens, logits, settings):
    """The guided logits [V] of a request, by the processor for `transformers` and without a cache."""
    if settings is None:
        return logits
    settings = dict(settings)
    names = settings.pop("guide")
    chosen = [loaded[name] for name in ([names] if isinstance(names, str) else names)]
    processor = GuidanceLogitsProcessor(chosen, top_k_candidates=K, temperature=0.7, **settings)
    return processor(torch.tensor([tokens]), logits[None])[0]


class Runner:
    """Requests that come, end and stall at random; `rows` are in the order of the logits.

    A new request takes a hole that an ended one left, or a row at the end; other holes are filled by the last rows; and
    now and then two rows are swapped.
    """

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.rows = []
        self.begun = 0

    def new(self):
        prompt = self.rng.integers(1, V, self.rng.choice([1, 2, 9])).tolist()
        self.begun += 1
        return SimpleNamespace(prompt=prompt, output=[], settings=SETTINGS[self.begun % len(SETTINGS)])

    def step(self):
        """Draw a token for most requests, and return vLLM's BatchUpdate, None if no row has changed."""
        for request in self.rows:
            if self.rng.random() < 0.85:  # others are prompts of which a part is computed
                request.output.append(int(self.rng.integers(1, V)))
        ended = [row for row, request in enumerate(self.rows) if len(request.output) > self.rng.integers(3, 12)]
        for row in ended:
            self.rows[row] = None
        added, moved = [], []
        for _ in range(int(self.rng.integers(0, 3)) if len(self.rows) < 6 else 0):
            row, request = self.rows.index(None) if None in self.rows else len(self.rows), self.new()
            self.rows[row : row + 1] = [request]
            added.append((row, sampling(request.settings), request.prompt, request.output))
        removed = [row for row in ended if self.rows[row] is None]
        while None in self.rows:
            if (last := self.rows.pop()) is not None:
                hole = self.rows.index(None)
                self.rows[hole] = last
                moved.append((len(self.rows), hole, Direction.UNIDIRECTIONAL))
        if len(self.rows) > 2 and self.rng.random() < 0.3:
            self.rows[0], self.rows[2] = self.rows[2], self.rows[0]
            moved.append((0, 2, Direction.SWAP))
        return SimpleNamespace(removed=removed, added=added, moved=moved) if removed or added or moved else None

    def logits(self):
        return torch.tensor(self.rng.normal(size=(len(self.rows), V)) * 2, dtype=torch.float32)


def assert_alone(loaded, runner, logits, got):
    for row, request in enumerate(runner.rows):
        want = one_at_a_time(loaded, request.prompt + request.output, logits[row], request.settings)
        torch.testing.assert_close(got[row], want, atol=1e-4, rtol=0)


def test_rows_that_move_are_steered_as_alone(plugin, loaded):
    """V1: rows are added, removed and moved; several guides and etas in one batch."""
    runner, processor = Runner(), plugin.GuidanceLogitsProcessor(config(), torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    for _ in range(25):
        processor.update_state(runner.step())
        logits = runner.logits()
        assert_alone(loaded, runner, logits, processor.apply(logits.clone()))
    assert runner.begun > 12


def test_slots_that_are_taken_again_are_steered_as_alone(plugin, loaded):
    """V2: a request has a slot, of which the rows of a step are some, in any order."""
    runner = Runner()
    states = SimpleNamespace(
        device=torch.device("cpu"), all_token_ids=SimpleNamespace(gpu=torch.zeros(16, 32, dtype=torch.int32))
    )
    processor = plugin.GuidanceLogitsProcessor(config(), states)
    slots = {}
    for _ in range(15):
        runner.step()
        slots = {id(request): slots[id(request)] for request in runner.rows if id(request) in slots}
        for request in runner.rows:
            if id(request) not in slots:
                slots[id(request)] = slot = min({*range(16)} - {*slots.values()})
                assert processor.add_request(slot, sampling(request.settings)) == (request.settings is not None)
        places = [slots[id(request)] for request in runner.rows]
        sequences = [request.prompt + request.output for request in runner.rows]
        for slot, tokens in zip(places, sequences):
            states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens)
        layout = SimpleNamespace(idx_mapping_np=np.array(places), seq_lens_upper_bound_np=np.array([*map(len, sequences)]))
        logits = runner.logits()
        assert_alone(loaded, runner, logits, processor.apply(logits.clone(), layout))


def test_fields_out_of_range_are_refused_before_the_engine_sees_them(plugin):
    processor = plugin.GuidanceLogitsProcessor
    processor.validate_params(sampling(None))
    processor.validate_params(sampling(dict(eta=0.1, guide="short")))
    for fields, message in [
        (dict(eta="0.1", guide="short"), "eta is '0.1'; it must be a number of at least 1e-06"),
        (dict(eta=0, guide="short"), "eta is 0; it must be"),
        (dict(eta=math.nan, guide="short"), "eta is nan; it must be"),
        (dict(eta=0.1), "guide is None; it must be one of short, kind"),
        (dict(eta=0.1, guide="long"), "guide is 'long'; it must be one of short, kind"),
        (dict(eta=0.1, guide=5), "guide is 5; it must be one of short, kind"),
        (dict(eta=0.1, guide=[["short"]]), r"guide is \[\['short'\]\]; it must be one of short, kind"),
        (dict(eta=0.1, guide=["short", "kind"]), "give 2 numbers"),
        (dict(eta=0.1, guide="short", weights="1"), "weights are '1'; they must be a list of numbers"),
        (dict(eta=0.1, guide="short", top_k_candidates=2.5), "top_k_candidates is 2.5; it must be a whole number"),
        (dict(eta=0.1, guide="short", mode="best"), "mode is 'best'; it must be one of qsharp"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.validate_params(sampling(fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(speculative="ngram"), "leave speculative decoding and prompt embeddings out"),
        (dict(async_scheduling=True), "start vLLM with --no-async-scheduling"),
        (dict(max_model_len=64), "the guide short has 32 positions; start vLLM with --max-model-len 32"),
    ],
)
def test_settings_that_hide_tokens_from_the_guide_are_refused_at_the_start(changes, message, plugin):
    with pytest.raises(ValueError, match=message):
        plugin.GuidanceLogitsProcessor(config(**changes), torch.device("cpu"), False)
