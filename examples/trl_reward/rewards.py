"""Two reward functions as TRL's `GRPOTrainer(reward_funcs=[...])` calls them; the same file works with both programs.

    qsharp run --ref MODEL --prompts examples/trl_reward/prompts.jsonl --reward examples/trl_reward/rewards.py:brief \
        --reward examples/trl_reward/rewards.py:on_topic --workdir runs/trl_reward
    python examples/trl_reward/grpo.py MODEL     # with TRL, in an environment of its own
"""


def brief(completions, completion_ids, **kwargs):
    """1 for an answer of one token, falling to 0 at 64."""
    return [max(0.0, 1 - (len(ids) - 1) / 63) for ids in completion_ids]


def on_topic(completions, topic, log_metric, **kwargs):
    """1 if the answer names the topic, a column of the prompts."""
    named = [float(word in completion) for word, completion in zip(topic, completions, strict=True)]
    log_metric("on_topic", sum(named) / len(named))
    return named
