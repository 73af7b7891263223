"""Openings of reviews that are to go on kindly, by VADER's word list (Hutto and Gilbert, 2014).

    pip install vaderSentiment
    qsharp run --config examples/sentiment/config.py --config.ref=MODEL --workdir runs/sentiment

`reward` is the compound score of opening and continuation, in [-1, 1]. With `--config.task.rewards=FILE:positive
--config.task.weights=1` it is 1 where that is above 0.3, else 0. Things reviewed are split into those for training and
those for the test.
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

THINGS = (
    "the hotel", "the soup", "this phone", "the concert", "the museum", "our flight", "the new teacher", "the novel",
    "the play", "this camera", "the train ride", "the dentist", "the pizza", "the course", "the city tour", "this game",
    "the beach", "the coffee", "the wedding", "this laptop", "the landlord", "the film", "the gym", "the bakery",
    "the painting", "our guide", "the zoo", "this bicycle", "the campsite", "the album", "the interview", "the match",
)  # fmt: skip
OPENINGS = (
    "I thought {} was", "When I first heard about {}, I", "My sister told everyone that {} was",
    "To tell the truth, {} was", "After everything I had read, {}", "What I will remember about {} is",
    "My honest opinion of {}:", "We came because of {}, which", "If you ask me about {}, I would say that",
    "The best way to describe {} is", "Before you spend money on {}, know that", "Five minutes into it, {}",
)  # fmt: skip
_analyzer = SentimentIntensityAnalyzer()


def problems(split: str) -> list[dict[str, str]]:
    """One problem for each thing of a split and each opening: five things in eight are for training."""
    things = [thing for place, thing in enumerate(THINGS) if (place % 8 in (2, 5, 7)) == (split == "test")]
    return [{"prompt": opening.format(thing)} for thing in things for opening in OPENINGS]


def reward(prompts, completions, **kwargs) -> list[float]:
    """VADER's compound score of each opening with its continuation."""
    texts = (prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
    return [_analyzer.polarity_scores(text)["compound"] for text in texts]


def positive(prompts, completions, **kwargs) -> list[float]:
    """1 where the compound score is above 0.3, else 0."""
    return [float(score > 0.3) for score in reward(prompts, completions)]
