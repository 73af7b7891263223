"""Openings of reviews as in `task.py`, of four times as many things for training; those for the test are the same.

    qsharp run --config examples/sentiment/config.py --config.task.file=examples/sentiment/more_things.py \\
        --config.collect.prompts=960 --config.collect.samples=4 --config.ref=MODEL --workdir runs/more_things

takes as many rollouts as `task.py` with 16 of a prompt.
"""

import task

MORE_THINGS = (
    "the museum shop", "the lecture", "the restaurant", "this backpack", "the opera", "the ferry", "the new neighbor",
    "the magazine", "the salad", "this printer", "the bus ride", "the surgeon", "the sandwich", "the workshop",
    "the castle tour", "this puzzle", "the lake", "the tea", "the funeral", "this tablet", "the plumber",
    "the documentary", "the swimming pool", "the butcher", "the sculpture", "our driver", "the aquarium", "this car",
    "the hostel", "the song", "the meeting", "the race", "the cruise", "the steak", "this watch", "the ballet",
    "the gallery", "our waiter", "the new boss", "the poem", "the musical", "this television", "the taxi ride",
    "the nurse", "the cake", "the seminar", "the boat trip", "this toy", "the garden", "the wine", "the party",
    "this keyboard", "the mechanic", "the series", "the yoga class", "the market", "the exhibition", "our host",
    "the circus", "this jacket",
)  # fmt: skip
reward = task.reward


def problems(split: str) -> list[dict[str, str]]:
    """The problems of `task.py`; for training those of more things too."""
    more = MORE_THINGS if split == "train" else ()
    return task.problems(split) + [{"prompt": opening.format(thing)} for thing in more for opening in task.OPENINGS]
