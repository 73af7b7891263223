"""Tasks: problems with a verified reward. A task is one module here and one line in `registry.py`.

Every task has

  check(config) -> None                    ValueError, in one sentence, for a setting out of range
  problems(config, split, count, seed)     -> list[Problem], distinct; split is "train" or "test"
  parse(response) -> str | None            the final answer, None if there is none
  SYMBOLIC: bool                           True: answers are mathematics and `qsharp_jax.tasks.judging` compares them
  FINITE: bool                             True: a fixed data set; every round uses all of its training problems

A task that is not symbolic has

  reward(problem, response) -> float       the verified reward; other values than 0.0 and 1.0 want a categorical guide

A task that is not finite has what its reference model is trained on

  make_tokenizer(config) -> tokenizer      built offline; lossless on the task's texts; adds no special tokens
  pretraining_texts(config, count, seed)   -> list[(prompt, response)] of train problems

A finite task has

  every_problem(data) -> list[Problem]     of all files; `data` is as in the config
  gold(answer) -> str                      a data set's answer in the form of `Problem.answer`; else a ValueError

The user's own task (own.py) is finite and has no answers. In place of `parse` and `reward` it has

  judge(config) -> RewardJudge             calls the user's reward functions
  available(config, split) -> int          how many problems there are, of which `problems` draws at most `count`
  files(config) -> list[Path]              the files that it is made of, which must not change during a run

`config` is any object with the attributes listed at the top of the task's file.
"""
