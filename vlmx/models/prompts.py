"""How does a conversation become token ids, and which of them are learned? The prompt formats.

Text that the user says is never supervised; answers and the token that ends them are. The literal `<image>` is removed
and messages are stripped in training and in evaluation alike: visual tokens always stand right after BOS (or first of
all, where there is none), wherever the annotation put the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmx.errors import UsageError
from vlmx.registry import Registry

IGNORED = -100
AUTO = "auto"
CHAT = "chat"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Exchange = tuple[str, str]  # question, answer


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Token ids that are learned together or not at all."""

    ids: list[int]
    supervised: bool


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """Token ids of one training example, without the visual tokens.

    Attributes:
        input_ids: the text; its first `Prompt.visual_at` ids (BOS, if there is one) stand before the visual tokens.
        labels: the same ids where they are learned, -100 elsewhere; not shifted.
        turn_of_token: 0 for what stands before the visual tokens, k for the k-th exchange (from 1).
    """

    input_ids: list[int]
    labels: list[int]
    turn_of_token: list[int]


class Prompt(ABC):
    """One prompt format with one tokenizer.

    Attributes:
        visual_at: where the visual tokens go: 1 (after BOS), or 0 if there is no BOS.
        end_ids: ids that end an answer.
        notes: what the user should know of this format with this tokenizer, one line each.
    """

    name: ClassVar[str]
    notes: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.visual_at = 0 if tokenizer.bos_token_id is None else 1
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the LLM's tokenizer has no end-of-sequence token",
                why="an answer would never end",
                fix="set eos_token in its tokenizer_config.json",
            )
        self.end_ids: list[int] = [tokenizer.eos_token_id]

    @abstractmethod
    def segments(self, conversations: Sequence[Sequence[Exchange]]) -> list[list[Segment]]:
        """For each conversation two segments an exchange, question then answer; BOS is not among them."""

    @abstractmethod
    def encode_question(self, text: str) -> list[int]:
        """Ids of the prompt that asks `text`, BOS included, up to where the answer starts."""

    def encode(self, turns: Sequence[Exchange], *, isolated: bool = False) -> EncodedConversation:
        """Encode one conversation; see `encode_many`."""
        return self.encode_many([turns], isolated=isolated)[0]

    def encode_many(
        self, conversations: Sequence[Sequence[Exchange]], *, isolated: bool = False
    ) -> list[EncodedConversation]:
        """Encode conversations together, which is faster than one by one.

        Args:
            isolated: encode every exchange as if it were a conversation of its own (system text included); only what
                stands before the visual tokens is shared.
        """
        cleaned = [[(clean(question), clean(answer)) for question, answer in turns] for turns in conversations]
        if not isolated:
            return [self._join(parts) for parts in self.segments(cleaned)]
        alone = iter(self.segments([[exchange] for turns in cleaned for exchange in turns]))
        return [self._join([part for _ in turns for part in next(alone)]) for turns in cleaned]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens and outer white space removed."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _join(self, parts: Sequence[Segment]) -> EncodedConversation:
        ids = [self.tokenizer.bos_token_id] if self.visual_at else []
        labels, turns = [IGNORED] * len(ids), [0] * len(ids)
        for number, part in enumerate(parts):
            ids += part.ids
            labels += part.ids if part.supervised else [IGNORED] * len(part.ids)
            turns += [number // 2 + 1] * len(part.ids)
        return EncodedConversation(input_ids=ids, labels=labels, turn_of_token=turns)


class TextPrompt(Prompt):
    """A format that is plain text: every segment is tokenised separately, without special tokens of the tokenizer's
    own.
    """

    @abstractmethod
    def question_text(self, question: str, *, first: bool) -> str:
        """The user's part of one exchange."""

    @abstractmethod
    def answer_text(self, answer: str) -> str:
        """The answer's part of one exchange, its end included."""

    def segments(self, conversations: Sequence[Sequence[Exchange]]) -> list[list[Segment]]:
        texts = [
            [
                text
                for number, (question, answer) in enumerate(turns)
                for text in (self.question_text(question, first=number == 0), self.answer_text(answer))
            ]
            for turns in conversations
        ]
        unique = list(dict.fromkeys(text for row in texts for text in row))
        encoded = self.tokenizer(unique, add_special_tokens=False)["input_ids"] if unique else []
        ids_of = dict(zip(unique, encoded, strict=True))
        return [
            [Segment(ids=ids_of[text], supervised=number % 2 == 1) for number, text in enumerate(row)] for row in texts
        ]

    def encode_question(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(self.question_text(clean(text), first=True), add_special_tokens=False)[
            "input_ids"
        ]
        return [self.tokenizer.bos_token_id, *ids] if self.visual_at else ids


class VicunaPrompt(TextPrompt):
    """Vicuna v1.5 as the reference uses it (prismatic-vlms, `vicuna_v15_prompter.py`): system text before the first
    question only, answers end in `</s>`, segments are stripped on the right."""

    name = "vicuna-v1.5"

    def question_text(self, question: str, *, first: bool) -> str:
        return (f"{VICUNA_SYSTEM} " if first else "") + f"USER: {question} ASSISTANT:"

    def answer_text(self, answer: str) -> str:
        return f"{answer or ' '}{self.tokenizer.eos_token}"


class PlainPrompt(TextPrompt):
    """`USER: {question} ASSISTANT: {answer}` and EOS, without a system text: the embedded mini LM's format."""

    name = "plain"

    def question_text(self, question: str, *, first: bool) -> str:
        return f"USER: {question} ASSISTANT:"

    def answer_text(self, answer: str) -> str:
        return f" {answer}{self.tokenizer.eos_token}"


PROMPTS: Registry[type[Prompt]] = Registry("prompt", group="vlmx.prompts")
for _prompt in (VicunaPrompt, PlainPrompt):
    PROMPTS.add(_prompt.name, _prompt)
PROMPTS.add(CHAT, "vlmx.models.chat:ChatPrompt")


def clean(message: str) -> str:
    """A message without the image's place-holder and outer white space."""
    return message.replace("<image>", "").strip()


def choose_prompt(name: str, tokenizer: Any, *, mini_llm: bool = False) -> Prompt:
    """Build the prompt format `name`; "auto" is `plain` for the mini LM, `chat` with a chat template, `vicuna-v1.5`
    otherwise.

    Raises:
        UnknownNameError: no format has this name.
        UsageError: the tokenizer lacks what the format needs.
    """
    if name == AUTO:
        name = PlainPrompt.name if mini_llm else CHAT if tokenizer.chat_template else VicunaPrompt.name
    return PROMPTS.get(name)(tokenizer)
