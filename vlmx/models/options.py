"""Which token says an option? Where a benchmark asks for the probabilities of a few answers instead of a text.

The paper's evaluation takes the id of each option encoded alone, which in Vicuna's tokenizer is the one with a space
("▁Yes"): there each segment of a conversation is encoded alone, so answers begin with that token in training, too. In
other tokenizers and formats the two rules part; what counts is what a model was taught to say after the prompt, so the
token is taken from an encoded example whose answer is the option.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmx.models.prompts import IGNORED, Prompt


def option_ids(prompt: Prompt, options: Sequence[str]) -> list[int]:
    """The id of each option as the first token of an answer.

    Raises:
        ValueError: an option is not exactly one token, or two are the same one, so that their probabilities cannot be
            read from the first token.
    """
    found: list[int] = []
    for option in options:
        learned = [label for label in prompt.encode([("?", option)]).labels if label != IGNORED]
        if learned and learned[-1] in prompt.end_ids:
            learned.pop()
        if len(learned) != 1:
            raise ValueError(f"as an answer '{option}' is {len(learned)} tokens of this LLM's tokenizer, not one")
        found += learned
    if len(set(found)) < len(found):
        raise ValueError(f"two of {', '.join(options)} are the same token of this LLM's tokenizer")
    return found
