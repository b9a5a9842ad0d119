"""Where do answers begin and end in an LLM's own chat template? Found by rendering marks, not by guessing.

A conversation is put together from what the template gives when each question is asked, so that every answer stands
right after the generation prompt, as in evaluation. For most templates that is the template's own text of the whole.
Some show earlier turns otherwise (Qwen3 takes thinking blocks out): here these stay as they were asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from vlmx.errors import UsageError
from vlmx.models.prompts import Exchange, Prompt, Segment, clean

TODAY = datetime(2024, 7, 26)  # what Llama 3.1's template takes where it does not know the date
_FIXED = {"date_string": f"'{TODAY:%d %b %Y}'", "enable_thinking": "false"}
_DATED = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_QUESTION, _ANSWER = "a", "qzanswerzq"


class ChatPrompt(Prompt):
    """The tokenizer's own chat template.

    In it the date is always the same, and thinking is off where that can be chosen; the tokenizer gets this template,
    so that it is saved with the model. What the template puts between the generation prompt and an answer, such as an
    empty thinking block, belongs to the question. An answer ends with the first special token after it, which is
    learned; EOS is put there if the template has none.

    Attributes:
        visual_at: 1 if the prompt begins with BOS and has no other one; 0 if it has no BOS, or one before every message
            (SmolLM2), which then is part of the message.
        lead: what follows the generation prompt.
    """

    name = "chat"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UsageError(
                "the LLM's tokenizer has no chat template", fix="choose prompt=vicuna-v1.5 or prompt=plain instead"
            )
        tokenizer.chat_template = fixed_template(tokenizer.get_chat_template())
        asked = self._render([("user", _QUESTION)], ask=True)
        self._before, mark, self._after = self._render(
            [("user", _QUESTION), ("assistant", _ANSWER)], ask=False
        ).partition(_ANSWER)
        if not mark:
            raise UsageError(
                "the LLM's chat template cannot be trained on",
                why="it does not show answers as they are",
                fix="choose prompt=plain instead",
            )
        between = self._before.removeprefix(asked) if self._before.startswith(asked) else ""
        self.lead = between.rstrip(" ")
        self._blanks = between[len(self.lead) :]  # tokenizers join them with the first word of the answer
        self._end = self._end_in(self._after)
        ids = self._ids([asked])[asked]
        self.visual_at = int(ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:])
        self.end_ids = sorted({tokenizer.eos_token_id, self._ids([self._end])[self._end][-1]})

    def encode_question(self, text: str) -> list[int]:
        question = self._asked(clean(text))
        return self._ids([question])[question]

    def segments(self, conversations: Sequence[Sequence[Exchange]]) -> list[list[Segment]]:
        rows = [self._texts(turns) for turns in conversations]
        unique = dict.fromkeys(text for row in rows for context, part in row for text in (context, context + part))
        ids_of = self._ids(list(unique))
        apart = [part for row in rows for context, part in row if not _follows(ids_of, context, part)]
        alone = self._ids(list(dict.fromkeys(apart)))
        return [
            [
                Segment(ids=self._part(ids_of, alone, context, part)[0 if number else self.visual_at :], supervised=s)
                for number, (context, part) in enumerate(row)
                for s in [number % 2 == 1]
            ]
            for row in rows
        ]

    def _part(self, ids_of: dict[str, list[int]], alone: dict[str, list[int]], context: str, part: str) -> list[int]:
        """Ids of a text after another one, whose own ids stay as they are."""
        if _follows(ids_of, context, part):
            return ids_of[context + part][len(ids_of[context]) :]
        return alone[part]

    def _texts(self, turns: Sequence[Exchange]) -> list[tuple[str, str]]:
        """For each question and each answer the text before it that matters to the tokenizer, and its own text."""
        if len(turns) > 1 and not self._goes_on:
            raise UsageError(
                "the LLM's chat template cannot be trained on turn by turn",
                why="it does not show earlier turns in the same form when a later one is added",
                fix="choose prompt=plain, or turns=isolated, which never shows it more than one turn",
            )
        parts: list[tuple[str, str]] = []
        for number, (question, answer) in enumerate(turns):
            text = self._next_question(question) if number else self._asked(question)
            parts.append((self._end if number else "", text))
            parts.append((text, self._blanks + self._shown(answer) + self._end))
        return parts

    def _asked(self, question: str) -> str:
        return self._render([("user", question)], ask=True) + self.lead

    def _next_question(self, question: str) -> str:
        """What follows the end of an answer when something else is asked."""
        messages = [("user", _QUESTION), ("assistant", _ANSWER), ("user", question)]
        return self._render(messages, ask=True).partition(_ANSWER)[2].removeprefix(self._end) + self.lead

    def _shown(self, answer: str) -> str:
        """An answer as the template writes it, for instance in lower case."""
        text = self._render([("user", _QUESTION), ("assistant", answer)], ask=False)
        inside = len(text) >= len(self._before) + len(self._after)
        if inside and text.startswith(self._before) and text.endswith(self._after):
            return text[len(self._before) : len(text) - len(self._after)]
        return answer

    @cached_property
    def _goes_on(self) -> bool:
        """Whether a second question follows a first one in the same form as a third one does a second."""
        second = [("user", _QUESTION), ("assistant", _ANSWER), ("user", "b")]
        third = [("user", "c"), ("assistant", "d"), *second]
        after = [self._render(messages, ask=True).partition(_ANSWER) for messages in (second, third)]
        return all(mark for _, mark, _ in after) and after[0][2] == after[1][2]

    def _end_in(self, after: str) -> str:
        """The text that ends an answer: up to the first special token; EOS, with a note, if there is none."""
        tokens = [token for token in self.tokenizer.get_added_vocab() if token.strip() and token in after]
        if not tokens:
            eos = str(self.tokenizer.eos_token)
            self.notes = (f"the LLM's chat template does not end answers: {eos} is put after each, and learned",)
            return eos
        first = min(tokens, key=lambda token: (after.index(token), -len(token)))
        return after[: after.index(first) + len(first)]

    def _ids(self, texts: Sequence[str]) -> dict[str, list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return dict(zip(texts, encoded, strict=True))

    def _render(self, messages: Sequence[Exchange], *, ask: bool) -> str:
        from jinja2 import TemplateError

        rows = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(self.tokenizer.apply_chat_template(rows, add_generation_prompt=ask, tokenize=False))
        except TemplateError as error:
            raise UsageError(
                "the LLM's chat template cannot be used",
                why=str(error),
                fix="choose prompt=plain instead, or correct the template",
            ) from error


def fixed_template(template: str) -> str:
    """A template whose prompts are the same every day, and do not ask for thinking."""
    text = _DATED.sub(lambda found: repr(TODAY.strftime(found[2])), template)
    known = [f"{{% set {name} = {value} %}}" for name, value in _FIXED.items() if name in template]
    start = "".join(known) + "\n"  # after a block, the line's end is not part of the text
    return text if not known or text.startswith(start) else start + text


def _follows(ids_of: dict[str, list[int]], context: str, part: str) -> bool:
    """Whether a context's ids stay the same when the part follows."""
    return ids_of[context + part][: len(ids_of[context])] == ids_of[context]
