"""Answers under a constraint that a program checks, such as "Use at most 15 words".

    qsharp run --config examples/constraints/config.py --config.ref=MODEL --workdir runs/constraints

A prompt joins a topic and a constraint. Topics are split into those for training and those for the test, so a guide has
to learn the constraints. A response passes if it ended by itself and keeps its prompt's constraint.
"""

import re

CONSTRAINTS = {
    "Answer in exactly two sentences.": lambda text: len(re.findall(r"[.!?]+(?=\s|$)", text)) == 2,
    "Use at most 15 words.": lambda text: 0 < len(text.split()) <= 15,
    "Do not use any commas.": lambda text: "," not in text,
    "End your answer with a question.": lambda text: text.endswith("?"),
    "Start your answer with the word Once.": lambda text: text.startswith("Once"),
}
TOPICS = """
air airports ants apples art atoms autumn babies bakeries banks bats beaches bears bees bells bicycles birds blood
boats bones books bread breakfast bridges buses butter butterflies cameras candles cars castles cats caves chairs
cheese chess children chocolate cities clocks clothes clouds coal coffee coins colors computers cooking copper corn
cotton cows crabs dancing deserts diamonds dinner doctors dogs dolphins doors dragons dreams drums ducks eagles ears
earthquakes eggs elephants engines eyes farms feathers fire fish flags flowers fog food forests foxes friends frogs
fruit games gardens ghosts glass goats gold grass guitars hair hats heat history homes honey horses hospitals hotels
ice insects iron islands jackets jokes keys kings kitchens kites ladders lakes lamps leaves lemons letters libraries
light lions machines magnets maps markets mathematics medicine memory metal mice milk mirrors money monkeys mountains
music names needles newspapers night numbers oceans oil onions oranges owls paint paper parents parks pencils pepper
phones photos pianos pigs pilots
""".split()


def problems(split: str) -> list[dict[str, str]]:
    """One problem for each topic of a split and each constraint: three topics in five are for training."""
    topics = [topic for place, topic in enumerate(TOPICS) if (place % 5 in (1, 3)) == (split == "test")]
    return [
        {"prompt": f"Tell me about {topic}. {constraint}", "constraint": constraint}
        for topic in topics
        for constraint in CONSTRAINTS
    ]


def reward(prompts, completions, constraint, finished, **kwargs) -> list[float]:
    """1 for a finished response that keeps its constraint, else 0."""
    return [
        float(ended and CONSTRAINTS[name](completion.strip()))
        for completion, name, ended in zip(completions, constraint, finished, strict=True)
    ]
