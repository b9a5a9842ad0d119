"""What does one process of several compute? Run alone and under torchrun, the results must be the same.

    torchrun --nproc-per-node 2 tests/step_checks.py FOLDER

FOLDER is that of `prepare`; each process leaves its results in FOLDER/rank-R-of-N.pt.
"""

import atexit
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_llm import tiny_llm, tiny_tokenizer
from torch.distributed.tensor import DTensor
from train_world import arguments, make_world

from vlmx.config import load_config
from vlmx.data.records import Conversation, Turn
from vlmx.runs import RunFolder
from vlmx.train.assemble import assemble
from vlmx.train.collate import build_collator
from vlmx.train.feed import Step
from vlmx.train.loop import train
from vlmx.train.optim import build_optimizer, set_learning_rates
from vlmx.train.parallel import World, exit_now, full_weights, join, leave
from vlmx.train.plan import make_plan
from vlmx.train.settings import TrainConfig
from vlmx.train.step import train_step

ALONE = World(rank=0, size=1, device=torch.device("cpu"), distributed=False)
LLMS = ("llm", "tied", "bin", "gpt2", "gemma2")
RUNS = {  # what is trained to the end, in both worlds
    "fixed": [],
    "recomputed": ["activation_checkpointing=true"],
    "isolated": ["turns=isolated", "loss_mean=answers"],
    "budget": ["micro_tokens=64"],
    "packed": ["packed=true", "micro_tokens=64", "activation_checkpointing=true"],
    "lora": ["lora.r=2", "lora.alpha=8", "optim.connector_lr=1e-3"],
    "frozen": ["freeze_llm=true"],
    "paper": ["order=paper", "loss_mean=microbatch", "micro_batch=2"],
}


def prepare(folder: Path) -> Path:
    """A small world with LLMs of several families, one of them without safetensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make_world(folder)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    small = {"head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 48}
    torch.manual_seed(0)
    llms = {
        "tied": tiny_llm(tied=True),
        "bin": tiny_llm(),
        "gpt2": AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, n_inner=48, resid_pdrop=0.0)),
        "gemma2": AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes, **small)),
    }
    for name, llm in llms.items():
        llm.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(llms["bin"].state_dict(), folder / "bin" / "pytorch_model.bin")
    return folder


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    named = dict(zip(arguments(folder, folder)[::2], arguments(folder, folder)[1::2], strict=True))
    values = {key: named[f"--{key}"] for key in ("cache", "connector", "llm", "data")}
    return load_config(TrainConfig, folder / "config.yaml", ["checkpoint.every_steps=0", *overrides], **values)


def plan_of(folder: Path, world: World, *overrides: str):
    return make_plan(config_of(folder, *overrides), caches=folder / "caches", world_size=world.size)


def one_step(folder: Path, world: World, *overrides: str):
    """Four conversations about images and four without; of several processes each has one micro-batch, of one kind."""
    plan = plan_of(folder, world, *overrides)
    trainee = assemble(plan, world)
    optimizer = build_optimizer(trainee.vlm, plan.config.optim, trainee.decaying)
    set_learning_rates(optimizer, 1.0)
    collator = build_collator(plan, trainee.prompt, trainee.vlm.llm.config)
    turns = (Turn(question="what is it?", answer="the red one"),)
    with_image = [Conversation(id=f"i{n}", image=f"{n + 1}.jpg", turns=turns) for n in range(4)]
    without = [Conversation(id=f"t{n}", image=None, turns=turns * (n + 1)) for n in range(4)]
    images = [plan.image_ids[c.image] for c in with_image]
    micro_batches = []
    size = 8 // max(2, world.size)
    for start in range(0, 8, size):
        rows = collator.rows([*with_image, *without][start : start + size])
        here = [row.image for row in rows if row.image is not None]
        micro = collator.batch(rows, {image: n for n, image in enumerate(images)})
        tokens_UND = torch.from_numpy(plan.reader.read(here))
        micro_batches.append(replace(micro, batch=replace(micro.batch, visual_UND=tokens_UND)))
    own = micro_batches[world.rank :: world.size]
    step = Step(index=0, example_ids=[c.id for c in with_image + without], images=images, micro_batches=own)
    return trainee, optimizer, plan, step


def check_mixed(folder: Path, world: World) -> dict:
    trainee, optimizer, plan, step = one_step(folder, world)
    result = train_step(trainee.vlm, optimizer, step, plan, world)
    weights = full_weights(trainee.vlm, world, plan.config.lora)
    return {"loss": result.loss, "norm": result.grad_norm, "weights": dict(weights)}


def check_loading(folder: Path, world: World) -> dict:
    """Loss of the same batch with each LLM, and how many numbers of the LLM this process holds."""
    results = {}
    for name in LLMS:
        trainee, _, _, step = one_step(folder, world, f"llm={folder / name}")
        trainee.vlm.eval()
        whole = sum(p.numel() for p in trainee.vlm.llm.parameters())
        held = [p.to_local() if isinstance(p, DTensor) else p for p in trainee.vlm.llm.parameters()]
        with torch.no_grad():
            losses = [float(trainee.vlm(micro.batch)) for micro in step.micro_batches]
        results[name] = {"losses": losses, "whole": whole, "held": sum(p.numel() for p in held)}
    return results


def check_precision(folder: Path, world: World) -> dict:
    """dtypes of weights and gradients in bfloat16, and whether gradients were added up in it."""
    results = {}
    for reduce in ("fp32", "bf16"):
        trainee, optimizer, plan, step = one_step(
            folder, world, "precision=bf16", f"reduce={reduce}", "optim.max_grad_norm=1e9"
        )
        result = train_step(trainee.vlm, optimizer, step, plan, world)
        parameters = [p for p in trainee.vlm.parameters() if p.grad is not None]
        gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
        gradient = trainee.vlm.llm.get_output_embeddings().weight.grad
        gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        results[reduce] = {
            "loss": result.loss,
            "dtypes": {str(t.dtype) for t in [*parameters, *gradients]},
            "rounded": bool((gradient == gradient.bfloat16().float()).all()),
        }
    return results


def check_runs(folder: Path, world: World) -> dict:
    """Losses and weights of whole trainings."""
    results = {}
    for name, overrides in RUNS.items():
        plan = plan_of(folder, world, *overrides)
        out = folder / f"{name}-{world.size}"
        train(plan, out, world, resume=False)
        results[name] = [line["loss"] for line in RunFolder(out).metrics()]
    return results


def run_checks(folder: Path, world: World) -> None:
    checks = (check_mixed, check_loading, check_precision, check_runs)
    results = {check.__name__.removeprefix("check_"): check(folder, world) for check in checks}
    torch.save(results, folder / f"rank-{world.rank}-of-{world.size}.pt")


def main() -> None:
    folder = Path(sys.argv[1])
    world = join()
    atexit.register(lambda: (folder / f"finalised-{world.rank}").touch())
    run_checks(folder, world)
    (folder / f"done-{world.rank}.json").write_text(json.dumps({"threads": torch.get_num_threads()}))
    leave(world)
    exit_now(0)


if __name__ == "__main__":
    main()
