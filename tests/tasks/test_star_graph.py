"""Star graphs against a search over the graph that the prompt spells out."""

import collections
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsharp_jax.tasks import star_graph
from qsharp_jax.tasks.base import Problem

CONFIG = types.SimpleNamespace(degree=3, path_length=4, num_nodes=50, pretrain_on="paths")


def changed(**settings):
    return types.SimpleNamespace(**{**vars(CONFIG), **settings})


def read(prompt):
    """Edges in the prompt's order, start and goal."""
    graph, query = prompt.removesuffix("=").split("/")
    edges = [tuple(map(int, edge.split(","))) for edge in graph.split("|")]
    start, goal = map(int, query.split(","))
    return edges, start, goal


def paths(edges, start, goal):
    """Every path from start to goal, by exhaustive search."""
    if start == goal:
        return [[goal]]
    return [[start, *rest] for a, b in edges if a == start for rest in paths(edges, b, goal)]


def content(prompt):
    edges, start, goal = read(prompt)
    return frozenset(edges), start, goal


@pytest.fixture(scope="module")
def train():
    return star_graph.problems(CONFIG, "train", 1000, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return star_graph.make_tokenizer(CONFIG)


@pytest.mark.parametrize("degree, path_length, num_nodes", [(2, 2, 3), (2, 5, 9), (3, 4, 50), (5, 5, 50)])
def test_the_answer_is_the_only_path(degree, path_length, num_nodes):
    config = changed(degree=degree, path_length=path_length, num_nodes=num_nodes)
    for problem in star_graph.problems(config, "train", 3, seed=0):
        edges, start, goal = read(problem.prompt)
        assert [",".join(map(str, path)) for path in paths(edges, start, goal)] == [problem.answer]
        assert len(problem.answer.split(",")) == path_length


def test_the_graph_is_a_star(train):
    for problem in train[:200]:
        edges, start, goal = read(problem.prompt)
        assert len(edges) == len(set(edges)) == 3 * (4 - 1)
        leaves = {b for _, b in edges} - {a for a, _ in edges}
        assert goal in leaves and len(leaves) == 3
        assert all(len(paths(edges, start, leaf)[0]) == 4 for leaf in leaves)
        nodes = {node for edge in edges for node in edge}
        assert len(nodes) == 1 + 9 and nodes <= set(range(50))


def test_edges_are_listed_in_random_order(train):
    places = collections.Counter()
    for problem in train:
        first = tuple(map(int, problem.answer.split(",")[:2]))
        places[read(problem.prompt)[0].index(first)] += 1
    assert set(places) == set(range(9))
    assert max(places.values()) < 2 * min(places.values())


def test_an_example_of_the_format():
    # Recorded: a change here gives the problems of old rollouts other ids, and moves some from train to test.
    config = changed(degree=2, path_length=3, num_nodes=12)
    expected = Problem(problem_id="fbef36b8e42bc117", prompt="10,3|1,10|11,2|1,11/1,3=", answer="1,10,3")
    assert star_graph.problems(config, "test", 1, seed=0) == [expected]


def test_a_problem_is_its_graph_whatever_the_order_of_edges():
    """There are 5! graphs G(2, 3) on 5 nodes: the start, the goal's arm, the other arm. Nearly all are drawn here."""
    config = changed(degree=2, path_length=3, num_nodes=5)
    problems = star_graph.problems(config, "train", 85, seed=0) + star_graph.problems(config, "test", 15, seed=1)
    assert len({content(problem.prompt) for problem in problems}) == 100
    assert len({problem.problem_id for problem in problems}) == 100


def test_train_and_test_stay_apart_for_every_seed():
    config = changed(degree=2, path_length=3, num_nodes=6)
    test = {content(p.prompt) for p in star_graph.problems(config, "test", 100, seed=0)}
    assert not test & {content(p.prompt) for p in star_graph.problems(config, "train", 400, seed=1)}
    assert not test & {content(prompt) for prompt, _ in star_graph.pretraining_texts(config, 2000, seed=2)}


def test_more_problems_than_there_are_is_an_error():
    config = changed(degree=2, path_length=2, num_nodes=3)
    with pytest.raises(ValueError, match=r"found \d distinct train problems, not the 100 asked for"):
        star_graph.problems(config, "train", 100, seed=0)


def test_pretraining_on_paths_shows_the_right_path():
    for prompt, response in star_graph.pretraining_texts(CONFIG, 200, seed=0):
        assert [list(map(int, response.split(",")))] == paths(*read(prompt))


def test_pretraining_on_walks_takes_every_arm_alike():
    texts = star_graph.pretraining_texts(changed(pretrain_on="walks"), 3000, seed=0)
    places, hits = collections.Counter(), 0
    for prompt, response in texts:
        edges, start, goal = read(prompt)
        walk = list(map(int, response.split(",")))
        assert paths(edges, start, walk[-1]) == [walk] and len(walk) == 4
        branches = [b for a, b in edges if a == start]
        places[branches.index(walk[1])] += 1
        hits += walk[-1] == goal
    # Three standard errors of a share of 1/3 in 3,000 draws are 0.026.
    for share in (*(n / 3000 for n in places.values()), hits / 3000):
        assert share == pytest.approx(1 / 3, abs=0.026)


def test_the_reward_is_one_for_the_path_and_nothing_else(train):
    for problem in train[:50]:
        assert star_graph.reward(problem, problem.answer) == 1.0
        assert star_graph.parse(problem.answer) == problem.answer
        nodes = problem.answer.split(",")
        wrong = [nodes[::-1], nodes[:-1], nodes[1:], [*nodes, nodes[-1]], [nodes[0], *nodes[2:]]]
        for response in [",".join(path) for path in wrong] + [problem.answer + " ", problem.answer + "|", ""]:
            assert star_graph.reward(problem, response) == 0.0


@pytest.mark.parametrize("response", ["", "1,", ",1", "1,,2", "1|2", "1, 2", "a", "1,2\n"])
def test_what_is_no_list_of_nodes_is_no_answer(response):
    assert star_graph.parse(response) is None


def test_three_tokens_an_edge(tokenizer):
    assert len(tokenizer) == 4 + 50 + 3
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("12,3|3,40/12,40=12,3,40"))
    assert pieces == ["12", "3", "|", "3", "40", "/", "12", "40", "=", "12", "3", "40"]


@given(st.lists(st.integers(4, 4 + 50 + 2), max_size=20))
def test_tokens_survive_the_text(tokenizer, ids):
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("text", ["50,1", "1, 2", "a", "01", "1;2"])
def test_unknown_nodes_and_signs_are_visible(tokenizer, text):
    assert tokenizer.unk_token_id in tokenizer.encode(text)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"degree": 1}, "degree is 1; a star graph needs at least 2 arms"),
        ({"path_length": 1}, "path_length is 1; a path needs at least 2 nodes"),
        ({"num_nodes": 9}, "num_nodes is 9; 3 arms with paths of 4 nodes need at least 10"),
        ({"pretrain_on": "both"}, "pretrain_on is 'both'; it must be one of paths, walks"),
    ],
)
def test_a_setting_out_of_range_is_an_error(settings, message):
    for function in (star_graph.check, star_graph.make_tokenizer):
        with pytest.raises(ValueError, match=message):
            function(changed(**settings))


def test_the_smallest_settings_pass():
    star_graph.check(CONFIG)
    star_graph.check(changed(num_nodes=10, pretrain_on="walks"))
    star_graph.check(changed(degree=2, path_length=2, num_nodes=3))
