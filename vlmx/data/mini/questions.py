"""What is asked about a scene, and what is the right answer? Nine groups, each drawn from a scene and dice.

Answers are balanced by drawing the wanted answer first and then something to ask for it. Positions in words follow the
middles of the visible boxes, and nothing is asked whose answer hangs on fewer than MARGIN_PX pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

from vlmx.data.mini.dice import Dice
from vlmx.data.mini.scenes import COLORS, IMAGE_PX, SHAPES, Color, PixelBox, Scene, SceneObject, Size

Group = Literal[
    "mini-attribute",
    "mini-count",
    "mini-exist",
    "mini-relation",
    "mini-read",
    "mini-ref",
    "mini-ref-plain",
    "mini-ref-phrase",
    "mini-ref-clutter",
]
Side = Literal["left", "right", "above", "below"]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
BOX_REQUEST = "Please provide the bounding box coordinate of the region this sentence describes:"
MARGIN_PX = 5
_COUNT_WEIGHTS = (4, 4, 9, 18, 36)  # rare counts are preferred where a scene has them, which levels the answers
_WORDS: dict[Side, str] = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_PLACES: dict[Side, tuple[str, str]] = {
    "left": ("left {}", "{} on the left"),
    "right": ("right {}", "{} on the right"),
    "above": ("top {}", "{} at the top"),
    "below": ("bottom {}", "{} at the bottom"),
}
_COLORED_SHAPES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
_SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question about one scene.

    Attributes:
        type: the class within which the answer prior is taken.
        answer: the text to learn.
        box: the visible box of the thing asked for, in pixels; None for questions in words.
    """

    group: Group
    type: str
    prompt: str
    answer: str
    box: PixelBox | None = None


def ask(scene: Scene, group: Group, dice: Dice) -> Asked | None:
    """Draw one question of `group` about `scene`; None if the scene has nothing to ask for."""
    return _ASKERS[group](scene, dice)


def box_text(box: PixelBox) -> str:
    """A pixel box as the answer "[x1, y1, x2, y2]" in parts of the image's side, two decimals."""
    return "[" + ", ".join(f"{edge / IMAGE_PX:.2f}" for edge in box) + "]"


def names_of(scene: Scene, thing: SceneObject) -> list[str]:
    """The shortest names that fit this object of the scene and no other; empty if even all attributes fit two."""
    if thing.shape == "sign":
        return ["sign"]
    color, shape, size = thing.color, thing.shape, thing.size
    for names in ([f"{color} object", shape], [f"{color} {shape}"], [f"{size} {color} {shape}"]):
        fitting = [name for name in names if len(named(scene, name)) == 1]
        if fitting:
            return fitting
    return []


@cache
def _attributes(name: str) -> tuple[str | None, str | None, str | None]:
    """(size, color, shape) that a name without a place asks for; None where it leaves that open."""
    *attributes, noun = name.split()
    size = next((word for word in attributes if word in get_args(Size)), None)
    color = next((word for word in attributes if word in get_args(Color)), None)
    return size, color, None if noun == "object" else noun


def named(scene: Scene, name: str) -> list[SceneObject]:
    """The objects that a name without a place, such as "small red circle", fits; "object" alone fits signs too."""
    size, color, shape = _attributes(name)
    return [
        thing
        for thing in scene.objects
        if shape in (None, thing.shape) and color in (None, thing.color) and size in (None, thing.size)
    ]


def _ahead_px2(thing: SceneObject, other: SceneObject, side: Side) -> int:
    """By how many half pixels the middle of `thing` lies on `side` of the middle of `other`."""
    axis = 0 if side in ("left", "right") else 1
    ahead = (thing.box[axis] + thing.box[axis + 2]) - (other.box[axis] + other.box[axis + 2])
    return -ahead if side in ("left", "above") else ahead


def _is_on(thing: SceneObject, other: SceneObject, side: Side) -> bool | None:
    """Whether `thing` lies on `side` of `other`; None if that is too close to call."""
    ahead = _ahead_px2(thing, other, side)
    return None if abs(ahead) < 2 * MARGIN_PX else ahead > 0


def _words(group: Group, type_: str, question: str, answer: str) -> Asked:
    return Asked(group=group, type=type_, prompt=question + SHORT_ANSWER, answer=answer)


def _region(group: Group, type_: str, phrase: str, thing: SceneObject) -> Asked:
    return Asked(group=group, type=type_, prompt=f"{BOX_REQUEST} {phrase}.", answer=box_text(thing.box), box=thing.box)


def _attribute(scene: Scene, dice: Dice) -> Asked | None:
    options: list[tuple[str, str, str]] = []
    for thing in scene.objects:
        if thing.shape == "sign":
            continue
        for name in (thing.shape, f"{thing.size} {thing.shape}"):
            if len(named(scene, name)) == 1:
                options.append(("what color", f"What color is the {name}?", thing.color))
                break
        for name in (f"{thing.color} object", f"{thing.size} {thing.color} object"):
            if len(named(scene, name)) == 1:
                options.append(("what shape", f"What shape is the {name}?", thing.shape))
                break
    if not options:
        return None
    kind = dice.pick(sorted({option[0] for option in options}))
    return _words("mini-attribute", *dice.pick([option for option in options if option[0] == kind]))


def _count(scene: Scene, dice: Dice) -> Asked | None:
    by_count: dict[int, list[str]] = {}
    for name, plural in [(s, "crosses" if s == "cross" else f"{s}s") for s in SHAPES] + [
        (f"{c} object", f"{c} objects") for c in COLORS
    ]:
        by_count.setdefault(len(named(scene, name)), []).append(plural)
    wheel = [count for count in sorted(by_count) if count < 5 for _ in range(_COUNT_WEIGHTS[count])]
    count = dice.pick(wheel)
    return _words("mini-count", "how many", f"How many {dice.pick(by_count[count])} are there?", str(count))


def _exist(scene: Scene, dice: Dice) -> Asked | None:
    kinds: tuple[list[str], ...] = ([f"{c} object" for c in COLORS], list(SHAPES), _COLORED_SHAPES)
    names = dice.pick(kinds)
    there = {name: bool(named(scene, name)) for name in names}
    wanted = dice.chance(50)
    fitting = [name for name in names if there[name] == wanted]
    if not fitting:
        return None
    if not wanted and names is _COLORED_SHAPES and dice.chance(50):  # both halves are there, but not in one object
        shapes, colors = {t.shape for t in scene.objects}, {t.color for t in scene.objects}
        fitting = [n for n in fitting if n.split()[0] in colors and n.split()[1] in shapes] or fitting
    return _words("mini-exist", "is there", f"Is there a {dice.pick(fitting)}?", "yes" if wanted else "no")


@lru_cache(maxsize=4)  # a scene is asked several times in a row
def _named_pairs(scene: Scene) -> list[tuple[str, SceneObject, str, SceneObject]]:
    named = [(names_of(scene, thing), thing) for thing in scene.objects]
    return [
        (first, thing, second, other)
        for firsts, thing in named
        for seconds, other in named
        if thing is not other and thing.shape != "sign"
        for first in firsts
        for second in seconds
    ]


def _relation(scene: Scene, dice: Dice) -> Asked | None:
    kind = dice.pick(("place", "side", "whether"))
    if kind == "place":
        return _attribute_at_place(scene, dice)
    pairs = _named_pairs(scene)
    if not pairs:
        return None
    name, thing, other_name, other = dice.pick(pairs)
    if kind == "side":
        ahead = {side: _ahead_px2(thing, other, side) for side in _SIDES}
        side = max(_SIDES, key=lambda s: ahead[s])
        across = min(abs(ahead["left"]), abs(ahead["above"]))
        if ahead[side] < across + 2 * MARGIN_PX:
            return None
        return _words("mini-relation", "where is", f"Where is the {name} relative to the {other_name}?", side)
    wanted = dice.chance(50)
    sides = [side for side in _SIDES if _is_on(thing, other, side) is wanted]
    if not sides:
        return None
    question = f"Is the {name} {_WORDS[dice.pick(sides)]} the {other_name}?"
    return _words("mini-relation", "is the", question, "yes" if wanted else "no")


def _attribute_at_place(scene: Scene, dice: Dice) -> Asked | None:
    """The color or shape, whichever the phrase does not give, of what a phrase such as "left circle" names."""
    options: list[tuple[str, str, str]] = []
    for phrase, thing in _place_phrases(scene):
        if thing.shape not in phrase:
            options.append(("what shape", f"What shape is the {phrase}?", thing.shape))
        if thing.color not in phrase:
            options.append(("what color", f"What color is the {phrase}?", thing.color))
    return _words("mini-relation", *dice.pick(options)) if options else None


def _read(scene: Scene, dice: Dice) -> Asked | None:
    if scene.sign_letter is None:
        return None
    question = dice.pick(("What letter is on the sign?", "What letter does the sign show?"))
    return _words("mini-read", "what letter", question, scene.sign_letter)


def _plain_phrases(scene: Scene) -> list[tuple[str, SceneObject]]:
    return [(name, thing) for thing in scene.objects if thing.shape != "sign" for name in names_of(scene, thing)]


@lru_cache(maxsize=4)  # a scene is asked several times in a row
def _place_phrases(scene: Scene) -> list[tuple[str, SceneObject]]:
    """Phrases such as "left circle", where "circle" alone would fit several."""
    names = ["object", *SHAPES, *(f"{c} object" for c in COLORS), *_COLORED_SHAPES]
    found = []
    for name in names:
        members = named(scene, name)
        if len(members) < 2:
            continue
        for side in _SIDES:
            for thing in members:
                if thing.shape != "sign" and all(o is thing or _is_on(thing, o, side) for o in members):
                    found += [(place.format(name), thing) for place in _PLACES[side]]
    return found


@lru_cache(maxsize=4)  # a scene is asked several times in a row
def _relation_phrases(scene: Scene) -> list[tuple[str, SceneObject]]:
    """Phrases such as "the circle that is above the red square", true of one of several circles."""
    anchors = [(name, thing) for thing in scene.objects for name in names_of(scene, thing)]
    found = []
    for name in ["object", *SHAPES, *(f"{c} object" for c in COLORS), *_COLORED_SHAPES]:
        fitting = named(scene, name)
        if len(fitting) < 2:
            continue
        for anchor_name, anchor in anchors:
            members = [thing for thing in fitting if thing is not anchor]
            if len(members) < 2:
                continue
            for side in _SIDES:
                on_side = [_is_on(thing, anchor, side) for thing in members]
                if None in on_side or sum(map(bool, on_side)) != 1:
                    continue
                thing = members[on_side.index(True)]
                if thing.shape != "sign":
                    found.append((f"the {name} that is {_WORDS[side]} the {anchor_name}", thing))
    return found


def _pick_region(group: Group, phrases: Sequence[tuple[str, SceneObject]], dice: Dice) -> Asked | None:
    """Draw the object first, so that an object with many names is not asked for more often than others."""
    if not phrases:
        return None
    things = list({id(thing): thing for _, thing in phrases}.values())
    wanted = dice.pick(things)
    phrase = dice.pick([phrase for phrase, thing in phrases if thing is wanted])
    return _region(group, group.removeprefix("mini-"), phrase, wanted)


def _ref(scene: Scene, dice: Dice) -> Asked | None:
    return None if scene.cluttered else _pick_region("mini-ref", _place_phrases(scene), dice)


def _ref_plain(scene: Scene, dice: Dice) -> Asked | None:
    return None if scene.cluttered else _pick_region("mini-ref-plain", _plain_phrases(scene), dice)


def _ref_phrase(scene: Scene, dice: Dice) -> Asked | None:
    return None if scene.cluttered else _pick_region("mini-ref-phrase", _relation_phrases(scene), dice)


def _ref_clutter(scene: Scene, dice: Dice) -> Asked | None:
    if not scene.cluttered:
        return None
    phrases = _plain_phrases(scene) if dice.chance(75) else _place_phrases(scene)
    return _pick_region("mini-ref-clutter", phrases, dice)


_ASKERS: dict[Group, Callable[[Scene, Dice], Asked | None]] = {
    "mini-attribute": _attribute,
    "mini-count": _count,
    "mini-exist": _exist,
    "mini-relation": _relation,
    "mini-read": _read,
    "mini-ref": _ref,
    "mini-ref-plain": _ref_plain,
    "mini-ref-phrase": _ref_phrase,
    "mini-ref-clutter": _ref_clutter,
}
