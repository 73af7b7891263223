"""The table of tasks, and what the tokenizers of all generated tasks have in common."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from qsharp_jax.tasks import registry

CONFIGS = {
    "arithmetic": SimpleNamespace(max_events=3, equation_fraction=0.4, error_scale=1.0),
    "star_graph": SimpleNamespace(degree=3, path_length=4, num_nodes=50, pretrain_on="paths"),
}


@pytest.mark.parametrize("name", registry.TASKS)
def test_every_task_in_the_table_has_all_functions(name):
    task = registry.get(name)
    functions = ["check", "problems", "parse"]
    functions += ["every_problem", "gold"] if task.FINITE else ["make_tokenizer", "pretraining_texts"]
    functions += [] if task.SYMBOLIC else ["reward"]
    for function in functions:
        assert callable(getattr(task, function))


def test_an_unknown_task_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="unknown task 'star-graph'; the tasks are .*; did you mean 'star_graph'"):
        registry.get("star-graph")
    with pytest.raises(ValueError, match=f"unknown task 'zzz'; the tasks are {', '.join(registry.TASKS)}$"):
        registry.get("zzz")


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizers_of_tasks(name, tmp_path):
    """The special tokens have the first ids and are never added; saved and loaded, nothing changes."""
    task, config = registry.get(name), CONFIGS[name]
    tokenizer, texts = task.make_tokenizer(config), task.pretraining_texts(config, 500, 0)
    texts += [(problem.prompt, problem.answer) for problem in task.problems(config, "test", 500, 0)]
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), type(tokenizer).from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        for prompt, response in texts:
            ids = loaded.encode(prompt + response)
            assert ids == tokenizer.encode(prompt) + tokenizer.encode(response) and not set(ids) & set(range(4))
            assert loaded.decode([1, *ids, 2], skip_special_tokens=True) == prompt + response


@pytest.mark.parametrize("name", CONFIGS)
def test_problems_and_texts_depend_on_the_seed_and_problems_not_on_the_count(name):
    task, config = registry.get(name), CONFIGS[name]
    first = task.problems(config, "train", 100, seed=0)
    assert task.problems(config, "train", 200, seed=0)[:100] == first != task.problems(config, "train", 100, seed=1)
    assert task.problems(config, "train", 0, seed=0) == []
    texts, again, others = (task.pretraining_texts(config, 100, seed=seed) for seed in (0, 0, 1))
    assert texts == again != others
    with pytest.raises(ValueError, match="split is 'validation'; it must be one of train, test"):
        task.problems(config, "validation", 1, seed=0)
