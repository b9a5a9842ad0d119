"""Does a run find its published row, and is what differs from that row named?"""

from pathlib import Path

import pytest

from vlmx.config import load_config
from vlmx.errors import UnknownNameError
from vlmx.evaluate.paper_recipe import recipe_remarks
from vlmx.evaluate.paper_rows import CALLED_COLLAPSED, match_row, paper_row, paper_rows, row_of_run
from vlmx.runs import RunFolder, write_json
from vlmx.train.settings import TrainConfig, preset_path, profile_overrides

VICUNA = {"llm": "lmsys/vicuna-7b-v1.5", "data": "llava_v1_5_mix665k.json"}


@pytest.mark.parametrize(
    ("cache", "connector", "name", "vqav2"),
    [
        ("vmamba-s-coco@512x512-0123456789ab", "mlp3", "vmamba-s-coco@512/mlp3", 65.98),
        ("vmamba-s-coco@512x512-0123456789ab", "mlp2", "vmamba-s-coco@512/mlp2", 66.42),
        ("vmamba-s-coco@800x1328-0123456789ab", "mlp2", "vmamba-s-coco@800x1328/mlp2", 64.87),
        (
            "dinov2-l@336x336-0123456789ab+clip-l-336@336x336-ba9876543210",
            "mlp2",
            "dinov2-l+clip-l-336@336/mlp2",
            65.08,
        ),
    ],
)
def test_a_row_is_found_by_tokens_and_connector(cache: str, connector: str, name: str, vqav2: float) -> None:
    match = match_row(cache=cache, connector=connector, **VICUNA)
    assert match.row is not None
    assert (match.row.name, match.row.published.scores["vqav2"]) == (name, vqav2)
    assert match.remarks == ()


def test_every_row_finds_itself() -> None:
    for row in paper_rows():
        size = row.preset.resolution
        cache = "+".join(f"{backbone}@{size}-0123456789ab" for backbone in row.preset.backbones)
        assert match_row(cache=cache, connector=row.preset.connector, **VICUNA).row is row


def test_a_run_of_no_row_is_told_how_to_name_one() -> None:
    match = match_row(cache="vmamba-s-coco@640x640-0123456789ab", connector="mlp2", **VICUNA)
    assert match.row is None
    assert match.remarks == (
        "no row of the paper is vmamba-s-coco@640x640 with mlp2; --row NAME says which one to compare with, "
        "e.g. vmamba-s-coco@800x1328/mlp2 (vlmx list rows)",
    )
    untrained = match_row(cache="clip-b@224x224-0123456789ab", connector="mlp2", encoder_weights="random:0")
    assert untrained.row is None
    assert "untrained encoder" in untrained.remarks[0]
    assert match_row(cache="clip-b@224x224-0123456789ab", connector="").row is None


def test_a_row_that_is_named_is_taken_and_differences_are_remarked() -> None:
    match = match_row(
        cache="vmamba-s-coco@640x640-0123456789ab",
        connector="linear",
        llm="meta/llama",
        data="mini",
        encoder_weights="random:0",
        row="vmamba-s-coco@512/mlp3",
    )
    assert match.row is paper_row("vmamba-s-coco@512/mlp3")
    assert match.remarks == (
        "its tokens are vmamba-s-coco@640x640, the row's vmamba-s-coco@512x512",
        "its connector is linear, the row's mlp3",
        "its encoder is untrained",
        "its LLM is meta/llama, the paper's Vicuna-7B v1.5",
        "it was trained on mini, the paper's on LLaVA-1.5's 665K mixture",
    )
    with pytest.raises(UnknownNameError, match="did you mean 'vmamba-s-coco@512/mlp3'"):
        match_row(cache="c", connector="mlp2", row="vmamba-s-coco@512/mlp4")


def test_labels_are_the_papers() -> None:
    assert paper_row("vmamba-s-coco@512/mlp3").label == "IN1K COCO VMamba-S(f), 50M, 512x512"
    assert paper_row("clip-b@224/mlp2").label == "CLIP-B, 86M, 224x224"


def test_the_rows_called_collapsed_exist() -> None:
    assert {row.name for row in paper_rows() if row.called_collapsed} == CALLED_COLLAPSED


def test_a_run_folder_says_connector_llm_and_data(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={"data": "x/llava_v1_5_mix665k.json"})
    write_json(run.path / "model/model.json", {"connector": "mlp3", "llm": "mini"})
    match = row_of_run(run, cache="vmamba-s-coco@512x512-0123456789ab")
    assert match.row is paper_row("vmamba-s-coco@512/mlp3")
    assert match.remarks == ("its LLM is mini, the paper's Vicuna-7B v1.5",)


@pytest.mark.parametrize(
    ("llm", "same"),
    [
        ("models/vicuna-7b-v1.5", True),
        ("lmsys/Vicuna-7B-v1.5/", True),
        ("lmsys/vicuna-7b-v1.5-16k", False),
        ("vicuna-7b", False),
    ],
)
def test_an_llm_that_looks_like_the_papers_is_remarked(llm: str, same: bool) -> None:
    match = match_row(cache="vmamba-s-coco@512x512-0123456789ab", connector="mlp3", llm=llm, data=VICUNA["data"])
    assert match.remarks == (() if same else (f"its LLM is {llm}, the paper's Vicuna-7B v1.5",))


def test_look_alike_data_and_any_weights_are_remarked() -> None:
    cache, data = "vmamba-s-coco@512x512-0123456789ab", "x/llava_v1_5_mix665k_tenth.json"
    match = match_row(cache=cache, connector="mlp3", llm=VICUNA["llm"], data=data, encoder_weights="ab" * 32)
    assert match.remarks == (
        "its encoder's weights (sha256 abababababab) are not compared with the paper's: no digest is known",
        "it was trained on x/llava_v1_5_mix665k_tenth.json, the paper's on LLaVA-1.5's 665K mixture",
    )


def test_another_recipe_is_remarked(tmp_path: Path) -> None:
    config = {"llm": "vicuna-7b-v1.5", "data": "llava_v1_5_mix665k.json", "max_steps": 2000, "epochs": 3}
    config |= {"freeze_llm": True, "lora": {"r": 8}, "global_batch": 128, "optim": {"lr": 1e-5, "weight_decay": 0.1}}
    run = RunFolder.create(tmp_path / "run", kind="train", config={**config, "order": "paper"})
    spec = {"geometry": {"mode": "stretch"}, "dtype": "int8"}
    write_json(run.path / "model/model.json", {"connector": "mlp3", "spec": spec, "prompt": "chat"})
    assert row_of_run(run, cache="vmamba-s-coco@512x512-0123456789ab").remarks == (
        "its photos are brought to size by stretch, the paper's by letterbox",
        "its tokens are stored in 8 bits, the paper's were never stored",
        "its training was set to stop after 2,000 steps, the paper's is one epoch",
        "it was trained for 3 epochs, the paper's for one",
        "its LLM was frozen, the paper's was trained",
        "its LLM was trained through adapters of rank 8, the paper's as a whole",
        "its training is set otherwise than the paper's: prompt=chat (vicuna-v1.5), optim.lr=1e-05 (2e-05)",
        "it was trained without --profile paper: optim.weight_decay=0.1 (0)",
    )


def test_the_papers_preset_and_profile_go_without_a_remark() -> None:
    config = load_config(TrainConfig, preset_path("paper"), ["cache=x", *profile_overrides("paper")]).model_dump()
    assert recipe_remarks(config, {"parts": [{"geometry": {"mode": "letterbox"}, "dtype": "float16"}]}) == []
    preset = load_config(TrainConfig, preset_path("paper"), ["cache=x"]).model_dump()
    (alone,) = recipe_remarks({**preset, "prompt": "vicuna-v1.5"}, {})
    assert alone.startswith("it was trained without --profile paper: optim.weight_decay=0.1 (0), loss_mean=tokens")
