"""Are groups, learning rates and clipping those of the recipe?"""

import math

import pytest
import torch
from tiny_llm import tiny_llm

from vlmx.models.connectors import build_connector
from vlmx.models.vlm import VLM
from vlmx.train.optim import (
    build_optimizer,
    clip_gradients,
    decaying_names,
    learning_rate,
    lr_factor,
    set_learning_rates,
)
from vlmx.train.settings import OptimConfig

T, W = 5198, 155  # 665,298 examples in batches of 128


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.0),
        (1, 1 / W),
        (W - 1, (W - 1) / W),
        (W, 1.0),
        ((T + W) // 2, 0.5 * (1 + math.cos(math.pi * ((T + W) // 2 - W) / (T - W)))),
        (T - 1, 0.5 * (1 + math.cos(math.pi * (T - 1 - W) / (T - W)))),
    ],
)
def test_schedule_of_the_paper(step, factor):
    assert lr_factor(step, T, 0.03) == pytest.approx(factor, abs=1e-12)


def test_schedule_is_hugging_faces():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=int(0.03 * 200), num_training_steps=200)
    for step in range(200):
        assert lr_factor(step, 200, 0.03) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_no_warm_up_starts_at_the_peak():
    assert lr_factor(0, 10, 0.0) == 1.0


def test_groups():
    vlm = VLM(build_connector("mlp2", 6, 32), tiny_llm())
    config = OptimConfig(lr=1e-3, connector_lr=5e-3, weight_decay=0.1)
    optimizer = build_optimizer(vlm, config, decaying_names(vlm))
    names = {id(p): name for name, p in vlm.named_parameters()}
    groups = {
        (group["peak_lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups[5e-3, 0.1] == {"connector.0.weight", "connector.2.weight"}
    assert groups[5e-3, 0.0] == {"connector.0.bias", "connector.2.bias"}
    assert {"llm.lm_head.weight", "llm.model.embed_tokens.weight"} < groups[1e-3, 0.1]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in groups[1e-3, 0.0]} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    set_learning_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 2.5e-3}
    assert learning_rate(optimizer) == 5e-4


def test_where_only_the_connector_learns_its_rate_is_the_rate():
    vlm = VLM(build_connector("mlp2", 6, 32), tiny_llm())
    vlm.llm.requires_grad_(False)
    optimizer = build_optimizer(vlm, OptimConfig(lr=1e-3, connector_lr=5e-3), decaying_names(vlm))
    set_learning_rates(optimizer, 0.5)
    assert learning_rate(optimizer) == 2.5e-3


def test_connector_rate_defaults_to_the_llms():
    vlm = VLM(build_connector("linear", 6, 32), tiny_llm())
    optimizer = build_optimizer(vlm, OptimConfig(lr=3e-4), decaying_names(vlm))
    assert {group["peak_lr"] for group in optimizer.param_groups} == {3e-4}


def test_clipping():
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, 10.0, distributed=False) == 5.0
    assert parameters[1].grad.tolist() == [4.0]
    assert clip_gradients(parameters, 1.0, distributed=False) == 5.0
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0])
    assert parameters[1].grad.tolist() == pytest.approx([0.8])
    parameters[1].grad = torch.tensor([math.inf])
    assert clip_gradients(parameters, 1.0, distributed=False) == math.inf
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0])
