"""Does each kind of bad input end `vlmx train` with one clear error and its exit code?"""

import json
import shlex
import shutil

import pytest
from PIL import Image
from tiny_llm import tiny_tokenizer
from train_world import arguments, make_world

from vlmx.cli import main
from vlmx.runs import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root, name="vmamba-mini-scenes", grid=(3, 3))
    return make_world(root)


def fails(capsys, command):
    """Exit code, and what, why and fix as lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["train", *command])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error ", "why ", "fix "))]
    return caught.value.code, dict(line.split(maxsplit=1) for line in lines)


def test_the_cache_lacks_images(world, tmp_path, capsys):
    rows = json.loads((world / "photos.json").read_text())
    rows += [{**rows[1], "id": f"new{n}", "image": f"new{n}.jpg"} for n in range(3)]
    (tmp_path / "photos.json").write_text(json.dumps(rows))
    command = [*arguments(world, tmp_path / "run"), "--data", str(tmp_path / "photos.json")]
    code, said = fails(capsys, command)
    assert code == 5
    assert said["error"].startswith("3 of 19 images of")
    assert said["fix"].startswith("vlmx extract --backbone vit-mini-scenes --res 64x64 ")


def test_two_caches_whose_grids_differ(world, tmp_path, capsys):
    code, said = fails(capsys, [*arguments(world, tmp_path / "run"), "--cache", "vmamba-mini"])
    assert code == 5
    assert "cannot be joined" in said["error"]
    assert "64" in said["why"]
    assert "96" in said["why"]


def test_an_llm_folder_without_weights(world, tmp_path, capsys):
    shutil.copytree(world / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "model.safetensors").unlink()
    code, said = fails(capsys, [*arguments(world, tmp_path / "run"), "--llm", str(tmp_path / "llm")])
    assert code == 4
    assert "has no weights" in said["error"]


def test_a_config_with_unknown_keys(world, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("learning_rate: 1\noptim: {wd: 0}\ncheckpoint: {keep: -1}\n")
    command = [*arguments(world, tmp_path / "run", "watch.bench=x"), "--config", str(tmp_path / "config.yaml")]
    code, said = fails(capsys, command)
    assert code == 2
    assert said["error"].startswith("4 problems in the configuration")
    for key in ("learning_rate is not known", "optim.wd is not known", "checkpoint.keep: ", "watch.bench is not known"):
        assert key in said["why"]
    assert not (tmp_path / "run").exists()


def test_corrupt_checkpoints_and_another_configuration(world, tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", *arguments(world, out)])
    (out / "model" / "model.json").unlink()
    RunFolder(out).set_status("failed")
    code, said = fails(capsys, ["--out", str(out), "--resume", "seed=8"])
    assert code == 2
    assert said["why"] == "seed: 7, now 8"
    for step in (2, 4):
        (out / "checkpoints" / f"step-{step}" / ".metadata").write_bytes(b"nothing")
    code, said = fails(capsys, ["--out", str(out), "--resume"])
    assert code == 7
    assert said["error"].startswith("all checkpoints in ")
    assert said["why"].count(".metadata is not what was written") == 2


@pytest.mark.parametrize("order", ["default", "paper"])
def test_a_seed_that_generators_cannot_take(world, tmp_path, capsys, order):
    command = [*arguments(world, tmp_path / "run"), "seed=18446744073709551616", f"order={order}", "optim.lr=-1"]
    code, said = fails(capsys, command)
    assert code == 2
    assert "seed" in said["why"]
    assert "optim.lr" in said["why"]


def test_options_for_encoding_on_the_fly_beside_a_cache(world, tmp_path, capsys):
    command = [*arguments(world, tmp_path / "run", "stream.threads=2"), "--res", "512", "--image-root", "data"]
    code, said = fails(capsys, command)
    assert code == 2
    assert said["why"].endswith("for encoding on the fly there is --res 512, --image-root data, stream.threads 2")
    assert said["fix"] == "leave --res, --image-root, stream.threads out, or give --cache none"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_an_llm_without_attention_heads(world, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes, bos_token_id=0, eos_token_id=1))
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    main(["train", *arguments(world, tmp_path / "run"), "--llm", str(tmp_path / "llm"), "--dry-run"])
    shown = capsys.readouterr()
    assert "warning: the LLM has no attention heads: the memory of its activations is estimated" in shown.err
    assert "Python and its libraries" in " ".join(shown.out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_the_command_for_missing_images_works_as_it_is_printed(world, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keys = [f"{folder}/{n}.png" for folder in ("vg/VG_100K", "coco") for n in range(5)]
    for number, key in enumerate(keys):
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (9 * number, 99, 0)).save(tmp_path / "photos" / key)
    turns = [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "no"}]
    rows = [{"id": key, "image": key, "conversations": turns} for key in keys]
    data, part = tmp_path / "lists" / f"all.{kind}", tmp_path / "part.json"
    data.parent.mkdir()
    part.write_text(json.dumps(rows[:1]))
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), data)
    else:
        data.write_text(json.dumps(rows))
    encoder = ["--backbone", "vit-mini-scenes", "--weights", "random:0", "--res", "64", "--threads", "1"]
    known = ["--data", str(part), "--image-root", str(tmp_path / "photos"), "--name", "photos"]
    caches = tmp_path / "caches"
    main(["extract", *encoder, *known, "--out", str(caches)])

    look = [*arguments(world, tmp_path / "run"), "--caches", str(caches), "--data", str(data), "--dry-run"]
    code, said = fails(capsys, [*look, "images=photos"])
    assert code == 5
    assert said["error"].startswith("9 of 10 images of")
    (listed,) = tmp_path.glob("vlmx-missing-images-*.txt")
    assert said["why"].startswith("5 in coco, 4 in vg/VG_100K; the first are vg/VG_100K/1.png, ")
    assert said["why"].endswith(f"; all 9 are in {listed}")
    command, _, _ = said["fix"].partition(" adds them")
    assert f"--name photos --image-root {tmp_path / 'photos'} --data {data}" in command
    main(shlex.split(command)[1:])
    main(["train", *look, "images=photos"])

    main(["extract", *encoder, "--weights", "random:1", "--limit", "2", "--out", str(caches)])
    other = capsys.readouterr().out.split()[-1]
    look[look.index("vit-mini")] = other
    code, said = fails(capsys, [*look, "images=photos"])
    assert code == 5
    assert said["error"] == f"10 of 10 images are not in cache {other}"
    assert said["why"].startswith("5 in vg/VG_100K, 5 in coco; the first are vg/VG_100K/0.png, ")
    command, _, _ = said["fix"].partition(" adds them")
    main(shlex.split(command)[1:])
    main(["train", *look, "images=photos"])
